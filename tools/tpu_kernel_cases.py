"""The kernels that tools/tpu_kernel_report.py compiles, by name.

A case is a function from `array(dtype, *shape)`, which makes an abstract argument on the TPU, and
options with defaults (integers, or strings) to a `Case`. `work` says, by a part of the kernel's
name, what one call of it does: (flops, grid steps, steps that execute the body).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = Callable[..., jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Case:
    """What is compiled, and the work of its kernels.

    Attributes:
        function: the function; it is jitted.
        args: its abstract arguments.
        work: (flops, grid steps, executed bodies) by a part of the kernel's name; "" is any.
        pallas: report Pallas kernels only, not XLA's own fusions.
    """

    function: Callable
    args: tuple[Any, ...]
    work: Mapping[str, tuple[float, int, int]]
    pallas: bool = True


def matmul_bf16(array: Array, M: int = 2048, D: int = 4096, F: int = 14336) -> Case:
    """XLA's own product of bfloat16 matrices: the bound for the quantized ones."""
    args = (array(jnp.bfloat16, M, D), array(jnp.bfloat16, D, F))
    return Case(jnp.matmul, args, {}, pallas=False)


def _splash(T: int, N: int, block: int, compute: int, fused: int) -> Callable:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as mask,
    )

    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=bool(fused),
    )
    heads = mask.MultiHeadMask([mask.CausalMask((T, T))] * N)
    attend = kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def one(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return attend(q, k, v, segment_ids=kernel.SegmentIds(segments, segments))

    return jax.vmap(one)


def _splash_args(array: Array, T: int, N: int, K: int, H: int) -> tuple:
    shapes = [(1, heads, T, H) for heads in (N, K, K)]
    return (*(array(jnp.bfloat16, *shape) for shape in shapes), array(jnp.int32, 1, T))


def causal_work(T: int, N: int, H: int, matmuls: int, block_q: int, block_k: int) -> tuple:
    """(flops, grid steps, blocks not wholly above the diagonal) of causal attention over N heads.

    The flops are those of the blocks that are computed, matmuls x 2 block_q block_k H each.
    """
    rows, columns = -(-T // block_q), -(-T // block_k)
    blocks = sum(1 for i in range(rows) for j in range(columns) if j * block_k < (i + 1) * block_q)
    flops = matmuls * 2 * block_q * block_k * H * blocks * N
    return flops, N * rows * columns, N * blocks


def splash_forward(
    array: Array,
    T: int = 8192,
    N: int = 32,
    K: int = 8,
    H: int = 128,
    block: int = 1024,
    compute: int = 1024,
) -> Case:
    """JAX's splash attention, causal, with segment ids; block_kv_compute is `compute`."""
    attend = _splash(T, N, block, compute, 0)
    return Case(
        attend, _splash_args(array, T, N, K, H), {"": causal_work(T, N, H, 2, block, block)}
    )


def splash_backward(
    array: Array,
    T: int = 8192,
    N: int = 32,
    K: int = 8,
    H: int = 128,
    block: int = 1024,
    compute: int = 1024,
    fused: int = 0,
) -> Case:
    """Forward and backward of splash attention: kernels for dq and dk, dv, or one for all."""
    attend = _splash(T, N, block, compute, fused)

    def loss(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return attend(q, k, v, segments).astype(jnp.float32).sum()

    matmuls = {"fwd": 2, "dq_": 3, "dkv": 5 if fused else 4}
    work = {part: causal_work(T, N, H, n, block, block) for part, n in matmuls.items()}
    return Case(jax.grad(loss, argnums=(0, 1, 2)), _splash_args(array, T, N, K, H), work)


CASES: Mapping[str, Callable[..., Case]] = {
    "matmul-bf16": matmul_bf16,
    "splash-forward": splash_forward,
    "splash-backward": splash_backward,
}
