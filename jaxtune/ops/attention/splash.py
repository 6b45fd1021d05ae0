"""JAX's splash attention for TPU (jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10.2).

For comparison with our own kernels, and where it applies: tokens that attend to one another, in
rows whose length is a multiple of 128. It has no derivative of the log-sum-exp, skips blocks by
position only, not by segment, and multiplies float32 probabilities whatever softmax_dtype says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from jaxtune.ops.attention.flash import Operands, refuse
from jaxtune.ops.attention.mask import Mask


def attend(operands: Operands, *, interpret: bool = False) -> tuple[jax.Array, None]:
    """Output [B, T, N, H] in q's dtype; None for the log-sum-exp.

    Args:
        operands: see `ops.attention`.
        interpret: run on any platform, slowly; for tests.

    Raises:
        NotImplementedError: prefix, columns, alibi, relative, query_offset, keys of other tokens,
            or a length that is no multiple of 128.
    """
    refuse("splash", operands, "prefix", "columns", "alibi", "relative", "query_offset", "lengths")
    _, t, n, _ = operands.q.shape
    if t % kernels.NUM_LANES:
        raise NotImplementedError(f"splash attention needs a multiple of 128 tokens, not {t}")
    block = next(size for size in (512, 256, 128) if t % size == 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(operands.mask, t)] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=operands.softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q = (operands.q.astype(jnp.float32) * operands.scale).astype(operands.q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, operands.k, operands.v))
    of_queries, of_keys = operands.mask.query_segments, operands.mask.key_segments
    segments = None
    if of_queries is not None and of_keys is not None:
        segments = kernels.SegmentIds(of_queries, of_keys)
    rows = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))
    y: Any = rows(q, k, v, segments, operands.sinks)
    return y.swapaxes(1, 2), None


def _mask(mask: Mask, t: int) -> masks.Mask:
    if mask.window is not None:
        before = mask.window - 1
        return masks.LocalMask((t, t), (before, 0 if mask.causal else before), offset=0)
    return masks.CausalMask((t, t)) if mask.causal else masks.FullMask((t, t))
