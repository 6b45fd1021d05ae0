"""Dense attention in float32, differentiated by JAX: every score is materialised."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED, Columns, Mask, visible


def attend(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's dtype and log-sum-exp float32 [B, T, N]; see `ops.attention`."""
    q, k, v = (x.astype(jnp.float32) for x in (operands.q, operands.k, operands.v))
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    positions = operands.query_offset + jnp.arange(t)[:, None]
    keys = jnp.arange(s)[None, :]

    q = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest")
    scores = scores.reshape(b, n, t, s) * operands.scale
    if operands.softcap is not None:
        scores = operands.softcap * jnp.tanh(scores / operands.softcap)
    if operands.alibi is not None:
        distance = jnp.abs(positions - (keys - operands.mask.prefix))
        distance = jnp.where(keys < operands.mask.prefix, 0, distance)
        slopes = jax.lax.stop_gradient(operands.alibi)
        scores -= slopes[:, None, None] * distance
    if operands.relative is not None:
        center = operands.relative.shape[1] // 2
        scores += operands.relative[:, center + keys - positions]
    sees = visible(_broadcast(operands.mask), positions, keys)
    sees = jnp.ones((1, t, s), bool) if sees is None else jnp.broadcast_to(sees, (b, t, s))
    sees = sees[:, None]

    # A sink is one more score, whose value is zero.
    scores = jnp.where(sees, scores, MASKED)
    if operands.sinks is not None:
        sinks = jnp.broadcast_to(operands.sinks[:, None, None], (b, n, t, 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    lse = jax.nn.logsumexp(scores, axis=-1)
    if operands.sinks is None:
        lse = jnp.where(sees.any(axis=-1), lse, MASKED)
    weights = jnp.where(sees, jax.nn.softmax(scores, axis=-1)[..., :s], 0.0)
    weights = weights.astype(operands.softmax_dtype).astype(jnp.float32)
    weights = weights.reshape(b, kv, n // kv, t, s)
    y = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest")
    return y.reshape(b, t, n, h).astype(operands.q.dtype), lse.transpose(0, 2, 1)


def _broadcast(mask: Mask) -> Mask:
    """The mask's arrays shaped for scores [B, T, S]."""
    if mask.query_segments is not None and mask.key_segments is not None:
        mask = dataclasses.replace(
            mask,
            query_segments=mask.query_segments[:, :, None],
            key_segments=mask.key_segments[:, None, :],
        )
    if mask.columns is None:
        return mask
    columns: Columns = jax.tree.map(lambda x: x[:, None, :], mask.columns)
    return dataclasses.replace(mask, columns=columns)
