"""Blockwise attention in plain XLA with a hand-written gradient.

The query axis is cut into blocks; each meets only the keys up to its last row, so nothing above the
diagonal is computed. The backward pass works on transposed score blocks, whose products have no
left operand contracted over its leading axis (slow on CPU). Kept for it: q, k, v, the output and
the log-sum-exp of each row, as in FlashAttention-2 (arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxtune.ops.attention.mask import visible

Segments = tuple[jax.Array | None, jax.Array | None]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: Segments,
    query_offset: int | jax.Array,
    softmax_dtype: DTypeLike,
) -> jax.Array:
    """See `ops.attention`; only for queries that start where the keys do."""
    if not (isinstance(query_offset, int) and query_offset == 0) or q.shape[1] != k.shape[1]:
        raise NotImplementedError("blockwise attention needs queries and keys of the same tokens")
    b, t, n, h = q.shape
    kv = k.shape[2]
    heads_first = q.transpose(0, 2, 1, 3).reshape(b, kv, n // kv, t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    y: jax.Array = _attend(heads_first, k, v, segments, jnp.dtype(softmax_dtype))
    return y.reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _blocks(t: int) -> list[tuple[int, int]]:
    """Query blocks [start, end): 128 rows, or more where that would make over 16 of them."""
    size = max(128, -(-t // 16))
    return [(start, min(t, start + size)) for start in range(0, t, size)]


def _sees(rows: tuple[int, int], cols: tuple[int, int], segments: Segments) -> jax.Array:
    """[B or 1, 1, 1, rows, cols]: `visible` for a block."""
    of_queries, of_keys = segments
    mask = visible(
        jnp.arange(*rows),
        jnp.arange(*cols),
        None if of_queries is None else of_queries[:, slice(*rows)],
        None if of_keys is None else of_keys[:, slice(*cols)],
    )
    return mask[:, None, None]


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, softmax_dtype: jnp.dtype
) -> jax.Array:
    """q [B, K, G, T, H] with G = N / K, k and v [B, K, T, H] -> [B, K, G, T, H]."""
    return _forward(q, k, v, segments, softmax_dtype)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, softmax_dtype: jnp.dtype
) -> tuple:
    b, kv, g, t, h = q.shape
    outputs, sums = [], []
    for start, end in _blocks(t):
        rows = end - start
        block = q[:, :, :, start:end].reshape(b, kv, g * rows, h)
        scores = _dot("bkth,bksh->bkts", block, k[:, :, :end]).reshape(b, kv, g, rows, end)
        scores = jnp.where(_sees((start, end), (0, end), segments), scores * h**-0.5, -1e30)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top).astype(softmax_dtype)
        total = weights.astype(jnp.float32).sum(axis=-1, keepdims=True)
        weights = weights.reshape(b, kv, g * rows, end)
        y = _dot("bkts,bksh->bkth", weights, v[:, :, :end].astype(softmax_dtype))
        outputs.append((y.reshape(b, kv, g, rows, h) / total).astype(q.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    y = checkpoint_name(jnp.concatenate(outputs, axis=3), "attention")
    log_sums = checkpoint_name(jnp.concatenate(sums, axis=3), "attention")
    return y, (q, k, v, segments, y, log_sums)


def _backward(softmax_dtype: jnp.dtype, saved: tuple, dy: jax.Array) -> tuple:
    q, k, v, segments, y, log_sums = saved
    b, kv, g, t, h = q.shape
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1)  # [B, K, G, T]
    dk, dv = [], []
    dq = jnp.zeros((b, kv, h, g, t), jnp.float32)
    k_transposed = k.swapaxes(2, 3)
    for start, end in _blocks(t):  # keys start:end meet the queries from start on
        cols = t - start
        queries = q[:, :, :, start:].reshape(b, kv, g * cols, h)
        dys = dy[:, :, :, start:].reshape(b, kv, g * cols, h)
        scores = _dot("bksh,bkth->bkst", k[:, :, start:end], queries)
        scores = scores.reshape(b, kv, end - start, g, cols) * h**-0.5
        sees = _sees((start, t), (start, end), segments).transpose(0, 1, 4, 2, 3)
        weights = jnp.exp(scores - log_sums[:, :, None, :, start:])
        weights = jnp.where(sees, weights, 0.0)
        dweights = _dot("bksh,bkth->bkst", v[:, :, start:end], dys).reshape(scores.shape)
        dscores = weights * (dweights - delta[:, :, None, :, start:]) * h**-0.5
        dscores = dscores.astype(q.dtype).reshape(b, kv, end - start, g * cols)
        weights = weights.astype(softmax_dtype).reshape(dscores.shape)
        dv.append(_dot("bkst,bkth->bksh", weights, dys.astype(softmax_dtype)))
        dk.append(_dot("bkst,bkth->bksh", dscores, queries))
        part = _dot("bkhs,bkst->bkht", k_transposed[:, :, :, start:end], dscores)
        dq = dq.at[..., start:].add(part.reshape(b, kv, h, g, cols))
    dq = dq.transpose(0, 1, 3, 4, 2).astype(q.dtype)
    dk, dv = (jnp.concatenate(parts, axis=2).astype(q.dtype) for parts in (dk, dv))
    return dq, dk, dv, (None, None)


_attend.defvjp(_forward, _backward)
