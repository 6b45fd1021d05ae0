"""The kernels that tools/tpu_kernel_report.py compiles, by name.

A case is a function from `array(dtype, *shape)`, which makes an abstract argument on the TPU, and
options with defaults (integers, or strings) to a `Case`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        pallas: report Pallas kernels only, not XLA's own fusions.
        flops: by a part of the kernel's name, where it has no cost estimate.
        executed: steps of the grid that execute the body, likewise, where it is not all of them.
        dense: executed bodies follow from the flops.
    """

    function: Callable
    args: tuple[Any, ...]
    pallas: bool = True
    flops: Mapping[str, float] = field(default_factory=dict)
    executed: Mapping[str, int] = field(default_factory=dict)
    dense: bool = False


def matmul_bf16(array: Array, M: int = 2048, D: int = 4096, F: int = 14336) -> Case:
    """XLA's own product of bfloat16 matrices: the bound for the quantized ones."""
    args = (array(jnp.bfloat16, M, D), array(jnp.bfloat16, D, F))
    flops = {"": 2.0 * M * D * F}
    return Case(jnp.matmul, args, pallas=False, flops=flops, dense=True)


def _splash(T: int, N: int, block_q: int, block_k: int, compute: int, fused: int) -> Callable:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as mask,
    )

    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_k,
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


def causal_blocks(T: int, N: int, block_q: int, block_k: int) -> int:
    """Blocks that are not wholly above the diagonal, over N heads."""
    return N * sum(
        min(-(-T // block_k), -(-end // block_k)) for end in range(block_q, T + 1, block_q)
    )


def splash_forward(
    array: Array,
    T: int = 8192,
    N: int = 32,
    K: int = 8,
    H: int = 128,
    block_q: int = 1024,
    block_k: int = 1024,
    compute: int = 512,
) -> Case:
    """JAX's splash attention, causal, with segment ids; block_kv_compute is `compute`."""
    blocks = causal_blocks(T, N, block_q, block_k)
    return Case(
        _splash(T, N, block_q, block_k, compute, 0),
        _splash_args(array, T, N, K, H),
        flops={"": 2.0 * blocks * 2 * block_q * block_k * H},
        executed={"": blocks},
    )


def splash_backward(
    array: Array,
    T: int = 8192,
    N: int = 32,
    K: int = 8,
    H: int = 128,
    block_q: int = 1024,
    block_k: int = 1024,
    compute: int = 1024,
    fused: int = 0,
) -> Case:
    """Forward and backward of splash attention: kernels for dq and dk, dv, or one for all."""
    attend = _splash(T, N, block_q, block_k, compute, fused)

    def loss(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return attend(q, k, v, segments).astype(jnp.float32).sum()

    blocks = causal_blocks(T, N, block_q, block_k)
    products = {"fwd": 2, "dq_": 3, "dkv": 5 if fused else 4}
    return Case(
        jax.grad(loss, argnums=(0, 1, 2)),
        _splash_args(array, T, N, K, H),
        flops={part: 2.0 * n * blocks * block_q * block_k * H for part, n in products.items()},
        executed={"": blocks},
    )


def quantized(
    array: Array,
    format: str = "nf4",
    M: int = 2048,
    D: int = 4096,
    F: int = 14336,
    dx: int = 0,
    rank: int = 0,
) -> Case:
    """x [M, D] W, or g [M, F] W^T with dx=1, with a rank's low-rank product added."""
    from jaxtune.ops.matmul import pallas_tpu
    from jaxtune.quant import quantize

    dense = jax.ShapeDtypeStruct((D, F), jnp.bfloat16)
    shapes = jax.eval_shape(lambda w: quantize(w, format), dense)
    w = jax.tree.map(lambda leaf: array(leaf.dtype, *leaf.shape), shapes)
    call = pallas_tpu.transposed if dx else pallas_tpu.forward
    x = array(jnp.bfloat16, M, F if dx else D)
    low = (array(jnp.bfloat16, M, rank), array(jnp.bfloat16, rank, D if dx else F))
    return Case(call, (x, w, low if rank else None), dense=True)


def attention(
    array: Array,
    T: int = 8192,
    N: int = 32,
    K: int = 8,
    H: int = 128,
    B: int = 1,
    segments: int = 1,
    window: int = 0,
    backward: int = 0,
    softmax: str = "bfloat16",
) -> Case:
    """Our attention, causal, with segment ids unless segments=0; backward=1: with its gradient.

    `softmax` is the dtype in which probabilities meet the values; float32 takes six passes.
    """
    from jaxtune import ops
    from jaxtune.ops.attention import Mask

    def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
        shown = ids if segments else None
        mask = Mask(window=window or None, query_segments=shown, key_segments=shown)
        kind = {"softmax_dtype": jnp.dtype(softmax), "implementation": "pallas_tpu"}
        return ops.attention(q, k, v, mask=mask, **kind)

    def loss(*args: Any) -> Any:
        return attend(*args).astype(jnp.float32).sum()

    args = [array(jnp.bfloat16, B, T, heads, H) for heads in (N, K, K)]
    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else attend
    return Case(function, (*args, array(jnp.int32, B, T)), dense=True)


def cross_entropy(
    array: Array, M: int = 512, D: int = 4096, V: int = 128256, dx: int = 1, dw: int = 0
) -> Case:
    """Head and loss of M tokens; dx=1, dw=1: with the gradients of hidden states and head."""
    from jaxtune import ops

    def loss(x: Any, w: Any, targets: Any, weights: Any) -> Any:
        given = {"transposed": False, "implementation": "pallas_tpu"}
        return ops.cross_entropy(x, w, targets, weights, **given)[0]

    wanted = [i for i, gradient in enumerate((dx, dw)) if gradient]
    args = array(jnp.bfloat16, 1, M, D), array(jnp.bfloat16, D, V), array(jnp.int32, 1, M)
    function = jax.value_and_grad(loss, wanted) if wanted else loss
    return Case(function, (*args, array(jnp.float32, 1, M)))


CASES: Mapping[str, Callable[..., Case]] = {
    "matmul-bf16": matmul_bf16,
    "matmul": quantized,
    "attention": attention,
    "cross-entropy": cross_entropy,
    "splash-forward": splash_forward,
    "splash-backward": splash_backward,
}
