"""Attention on a TPU: Pallas kernels of our own, forward and backward.

Every kernel walks over a list of blocks that XLA makes from the mask (`blocks.py`) and prefetches
to scalar memory; the grid is as long as the list, so a block that the mask empties costs nothing,
wherever it lies. Blocks that are seen whole run without mask arithmetic. Keys and values are never
repeated for the query heads that share them.
"""

import functools

import jax

from jaxtune.ops.attention import flash
from jaxtune.ops.attention.flash import Operands, Passes
from jaxtune.ops.attention.pallas_tpu_backward import backward as _backward
from jaxtune.ops.attention.pallas_tpu_forward import forward as _forward
from jaxtune.ops.attention.pallas_tpu_scores import Interpret, Sizes

__all__ = ["Sizes", "attend", "backward", "forward"]


def forward(
    operands: Operands, *, sizes: Sizes | None = None, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp float32 [B, T, N].

    Args:
        operands: see `flash.Operands`.
        sizes: of the blocks; None: by shape.
        interpret: run on CPU, as a program or simulating a TPU's memories.
    """
    return _forward(operands, sizes or Sizes(1024, 1024, 512), interpret)


def backward(
    operands: Operands,
    lse: jax.Array,
    dy: jax.Array,
    delta: jax.Array,
    *,
    sizes: Sizes | None = None,
    span: int | None = None,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v.

    Args:
        operands: see `flash.Operands`.
        lse: float32 [B, T, N], of the forward pass.
        dy: [B, T, N, H].
        delta: float32 [B, T, N], see `flash`.
        sizes: of the blocks; None: by shape.
        span: keys whose gradients are held in VMEM at a time; None: as many as fit.
        interpret: as in `forward`.
    """
    sizes = sizes or Sizes(1024, 1024, 512)
    return _backward(operands, (lse, delta, dy), sizes, span or 8192, interpret)


attend = functools.partial(flash.attend, Passes(forward, backward))
