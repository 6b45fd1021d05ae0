"""Attention on a TPU: Pallas kernels of our own, forward and backward.

Every kernel walks over a list of blocks that XLA makes from the mask (`blocks.py`) and prefetches
to scalar memory; the grid is as long as the list, so a block that the mask empties costs nothing,
wherever it lies. Blocks that are seen whole run without mask arithmetic. Keys and values are never
repeated for the query heads that share them.
"""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.attention import flash
from jaxtune.ops.attention.flash import Operands, Passes
from jaxtune.ops.attention.pallas_tpu_backward import Held
from jaxtune.ops.attention.pallas_tpu_backward import backward as _backward
from jaxtune.ops.attention.pallas_tpu_forward import forward as _forward
from jaxtune.ops.attention.pallas_tpu_scores import LANES, Interpret, Sizes

__all__ = ["Held", "Sizes", "attend", "backward", "forward"]

LEAST_VMEM = 16 * 2**20  # of v4; what every compiler allows a kernel that asks for no more


def forward(
    operands: Operands, *, sizes: Sizes | None = None, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp float32 [B, T, N].

    Args:
        operands: see `flash.Operands`.
        sizes: of the blocks; None: `default_sizes`.
        interpret: run on CPU, as a program or simulating a TPU's memories.

    Raises:
        NotImplementedError: a bias by distance.
    """
    flash.refuse("pallas_tpu", operands, "relative")
    return _forward(operands, sizes or default_sizes(operands), interpret)


def backward(
    operands: Operands,
    lse: jax.Array,
    dy: jax.Array,
    delta: jax.Array,
    *,
    sizes: Sizes | None = None,
    held: Held | None = None,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v.

    Args:
        operands: see `flash.Operands`.
        lse: float32 [B, T, N], of the forward pass.
        dy: [B, T, N, H].
        delta: float32 [B, T, N], see `flash`.
        sizes: of the blocks; None: `default_sizes`.
        held: the gradients held in VMEM; None: as many as the chip has room for.
        interpret: as in `forward`.
    """
    sizes = sizes or default_sizes(operands)
    held = held or default_held(operands, sizes, vmem_bytes())
    return _backward(operands, (lse, delta, dy), sizes, held, interpret)


def default_sizes(operands: Operands) -> Sizes:
    """Blocks of 1024, or 512 where an element of q takes four bytes or a head is over 128.

    Large blocks keep the matrix unit busy: on v5e (8k tokens, head 128, bfloat16) it is used in
    93 % of the forward's cycles and 98 % of the backward's with blocks of 1024, in 84 % and 94 %
    with 512. Short rows get smaller ones, because a block on the diagonal does twice the work it
    must, and lengths that are no multiple do where the filling would be over an eighth.
    """
    h = operands.q.shape[3]
    largest = 1024 if operands.q.dtype.itemsize == 2 and h <= LANES else 512

    def size(length: int) -> int:
        for size in (1024, 512, 256):
            rows = -(-length // size) * size
            blocks = 4 if size == 1024 else 2
            if size <= largest and rows >= blocks * size and rows <= 1.125 * length:
                return size
        return LANES

    keys = size(operands.k.shape[1])
    return Sizes(size(operands.q.shape[1]), keys, min(keys, 512))


def default_held(operands: Operands, sizes: Sizes, vmem: int) -> Held:
    """How many gradients a backward kernel with these blocks can hold on a chip with so much VMEM.

    Only v4 is left at the limit every chip has by default (16 MiB): it has no more.
    """
    limit = None if vmem <= LEAST_VMEM else vmem // 4 * 3
    h = -(-operands.q.shape[3] // LANES) * LANES
    bytes_ = operands.q.dtype.itemsize
    # q, dy and three forms of dq; k, v, dk and dv: all but one twice, for the copies in flight.
    of_query = h * (2 * 2 * bytes_ + 2 * 2 * 4 + 4)
    of_key = h * (4 * 2 * bytes_)
    scores = 3 * 4 * sizes.part * sizes.queries
    products = 4 * h * (2 * sizes.part + sizes.queries)
    used = sizes.queries * of_query + sizes.keys * of_key + scores + products
    room = (limit or LEAST_VMEM) - used
    blocks = max((room - 2**19) // (2 * 4 * h * sizes.keys), 1)
    # Spans of about the same length.
    spans = -(-operands.k.shape[1] // (blocks * sizes.keys))
    even = -(-operands.k.shape[1] // (spans * sizes.keys))
    return Held(keys=even * sizes.keys, vmem_limit=limit)


def vmem_bytes() -> int:
    """VMEM of a core of the chip that is traced for; the least of all where that is unknown."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # tracing on a CPU, for a TPU that is not there
        return LEAST_VMEM


attend = functools.partial(flash.attend, Passes(forward, backward))
