"""Blockwise attention in plain XLA with a hand-written gradient.

The query axis is cut into blocks; each meets only the keys up to its last row, so nothing above the
diagonal is computed. The backward pass works on transposed score blocks, whose products have no
left operand contracted over its leading axis (slow on CPU). Kept for it: q, k, v, the output and
the log-sum-exp of each row, as in FlashAttention-2 (arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp

from jaxtune.ops.attention import flash
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED, Mask, visible


def _heads_first(operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, K, G, T, H] with G = N / K, k and v [B, K, T, H]."""
    b, t, n, h = operands.q.shape
    kv = operands.k.shape[2]
    q = operands.q.transpose(0, 2, 1, 3).reshape(b, kv, n // kv, t, h)
    return q, operands.k.transpose(0, 2, 1, 3), operands.v.transpose(0, 2, 1, 3)


def _check(operands: Operands) -> None:
    if not (isinstance(operands.query_offset, int) and operands.query_offset == 0) or (
        operands.q.shape[1] != operands.k.shape[1]
    ):
        raise NotImplementedError("blockwise attention needs queries and keys of the same tokens")
    for name in ("sinks", "alibi", "softcap"):
        if getattr(operands, name) is not None:
            raise NotImplementedError(f"blockwise attention with {name}")


def _blocks(t: int) -> list[tuple[int, int]]:
    """Query blocks [start, end): 128 rows, or more where that would make over 16 of them."""
    size = max(128, -(-t // 16))
    return [(start, min(t, start + size)) for start in range(0, t, size)]


def _sees(rows: tuple[int, int], cols: tuple[int, int], mask: Mask) -> jax.Array:
    """[B or 1, 1, 1, rows, cols]: `visible` for a block."""
    if not mask.causal or mask.window or mask.prefix or mask.columns:
        raise NotImplementedError("blockwise attention is causal within segments")
    of_queries, of_keys = mask.query_segments, mask.key_segments
    mask = Mask(
        query_segments=None if of_queries is None else of_queries[:, slice(*rows), None],
        key_segments=None if of_keys is None else of_keys[:, None, slice(*cols)],
    )
    sees = visible(mask, jnp.arange(*rows)[None, :, None], jnp.arange(*cols)[None, None, :])
    assert sees is not None
    return sees[:, None, None]


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _forward(operands: Operands) -> tuple[jax.Array, jax.Array]:
    _check(operands)
    q, k, v = _heads_first(operands)
    mask, softmax_dtype = operands.mask, operands.softmax_dtype
    b, kv, g, t, h = q.shape
    outputs, sums = [], []
    for start, end in _blocks(t):
        rows = end - start
        block = q[:, :, :, start:end].reshape(b, kv, g * rows, h)
        scores = _dot("bkth,bksh->bkts", block, k[:, :, :end]).reshape(b, kv, g, rows, end)
        scores *= operands.scale
        scores = jnp.where(_sees((start, end), (0, end), mask), scores, MASKED)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top).astype(softmax_dtype)
        total = weights.astype(jnp.float32).sum(axis=-1, keepdims=True)
        weights = weights.reshape(b, kv, g * rows, end)
        y = _dot("bkts,bksh->bkth", weights, v[:, :, :end].astype(softmax_dtype))
        outputs.append((y.reshape(b, kv, g, rows, h) / total).astype(q.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    y = jnp.concatenate(outputs, axis=3).reshape(b, kv * g, t, h)
    lse = jnp.concatenate(sums, axis=3).reshape(b, kv * g, t)
    return y.transpose(0, 2, 1, 3), lse.transpose(0, 2, 1)


def _backward(
    operands: Operands, lse: jax.Array, dy: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = _heads_first(operands)
    mask, softmax_dtype = operands.mask, operands.softmax_dtype
    b, kv, g, t, h = q.shape
    dy = dy.transpose(0, 2, 1, 3).reshape(q.shape)
    lse, delta = (x.transpose(0, 2, 1).reshape(b, kv, g, t) for x in (lse, delta))
    dk, dv = [], []
    dq = jnp.zeros((b, kv, h, g, t), jnp.float32)
    k_transposed = k.swapaxes(2, 3)
    for start, end in _blocks(t):  # keys start:end meet the queries from start on
        cols = t - start
        queries = q[:, :, :, start:].reshape(b, kv, g * cols, h)
        dys = dy[:, :, :, start:].reshape(b, kv, g * cols, h)
        scores = _dot("bksh,bkth->bkst", k[:, :, start:end], queries)
        scores = scores.reshape(b, kv, end - start, g, cols) * operands.scale
        sees = _sees((start, t), (start, end), mask).transpose(0, 1, 4, 2, 3)
        weights = jnp.exp(scores - lse[:, :, None, :, start:])
        weights = jnp.where(sees, weights, 0.0)
        dweights = _dot("bksh,bkth->bkst", v[:, :, start:end], dys).reshape(scores.shape)
        dscores = weights * (dweights - delta[:, :, None, :, start:]) * operands.scale
        dscores = dscores.astype(q.dtype).reshape(b, kv, end - start, g * cols)
        weights = weights.astype(softmax_dtype).reshape(dscores.shape)
        dv.append(_dot("bkst,bkth->bksh", weights, dys.astype(softmax_dtype)))
        dk.append(_dot("bkst,bkth->bksh", dscores, queries))
        part = _dot("bkhs,bkst->bkht", k_transposed[:, :, :, start:end], dscores)
        dq = dq.at[..., start:].add(part.reshape(b, kv, h, g, cols))
    dq = dq.transpose(0, 4, 1, 3, 2).reshape(operands.q.shape).astype(q.dtype)
    dk, dv = (jnp.concatenate(parts, axis=2).transpose(0, 2, 1, 3) for parts in (dk, dv))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


attend = functools.partial(flash.attend, flash.Passes(_forward, _backward))
