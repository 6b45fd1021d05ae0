"""Attention of new tokens to a prefix, to a cache and to one another, for generation.

Scores against each are computed apart and meet in one softmax, so the cache is only read: the
caller appends to it once, after the last layer. Dense and float32.
"""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.ops.attention import Extras
from jaxtune.ops.attention.mask import MASKED


def cached_attention(
    q: jax.Array,
    new: tuple[jax.Array, jax.Array],
    past: tuple[tuple[jax.Array, jax.Array] | None, tuple[jax.Array, jax.Array]],
    *,
    segments: tuple[jax.Array, jax.Array],
    slots: jax.Array,
    window: int | None = None,
    **extras: Unpack[Extras],
) -> jax.Array:
    """softmax(q k^T scale) v over the cached keys and, causally, the new ones.

    Args:
        q: [B, T, N, H].
        new: keys and values of the same tokens, [B, K, T, H].
        past: keys and values [P, K, H] that every token sees, or None; keys and values of earlier
            tokens, [B, K, S, H].
        segments: int32 ids of the new tokens [B, T] and of the cache [B, S]; a token sees keys of
            its own segment only.
        slots: int32 [B, T], where in the cache the new tokens will be.
        window: see `Mask`.
        extras: see `Extras`, of which the offset is not read.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    prefix, cached = past
    scale, softcap = extras.get("scale"), extras.get("softcap")
    alibi, relative, sinks = (extras.get(name) for name in ("alibi", "relative", "sinks"))
    b, t, n, h = q.shape
    kv, s = cached[0].shape[1:3]
    query_segments, cached_segments = segments
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)

    def scores(keys: jax.Array, sees: jax.Array, distance: jax.Array) -> jax.Array:
        dots = jnp.einsum("bkqh,bksh->bkqs", grouped, keys, preferred_element_type=jnp.float32)
        dots = dots.reshape(b, kv, n // kv, t, -1) * (h**-0.5 if scale is None else scale)
        if softcap is not None:
            dots = softcap * jnp.tanh(dots / softcap)
        if alibi is not None:
            dots -= alibi.reshape(1, kv, n // kv, 1, 1) * distance[:, None, None]
        if relative is not None:
            columns = relative.shape[1] // 2 - distance
            found = jnp.take(relative, columns, axis=1, mode="clip").swapaxes(0, 1)
            dots += found.reshape(b, kv, n // kv, t, -1)
        if window is not None:
            sees &= distance < window
        return jnp.where(sees[:, None, None], dots, MASKED)

    def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
        weights = weights.reshape(b, kv, -1, weights.shape[-1])
        return jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)

    before = query_segments[:, :, None] == cached_segments[:, None, :]
    own = query_segments[:, :, None] == query_segments[:, None, :]
    distance = slots[:, :, None] - slots[:, None, :]
    groups = [
        (cached, before, slots[:, :, None] - jnp.arange(s)),
        (new, own & (distance >= 0), distance),
    ]
    if prefix is not None:
        length = len(prefix[0])
        keys, values = (jnp.broadcast_to(x.swapaxes(0, 1), (b, kv, length, h)) for x in prefix)
        everywhere = jnp.zeros((b, t, length), jnp.int32)
        groups.append(((keys, values), everywhere == 0, everywhere))
    dots = [scores(keys, sees, distance) for (keys, _), sees, distance in groups]
    if sinks is not None:
        dots.append(jnp.broadcast_to(sinks.reshape(1, kv, -1, 1, 1), (*dots[0].shape[:-1], 1)))
    weights = jax.nn.softmax(jnp.concatenate(dots, axis=-1), axis=-1).astype(
        extras.get("softmax_dtype", jnp.float32)
    )
    parts = jnp.split(weights, np.cumsum([x.shape[-1] for x in dots[:-1]]), axis=-1)
    # The sinks' part, if there is one, meets no values.
    mixed = [mix(part, values) for part, ((_, values), *_) in zip(parts, groups, strict=False)]
    y = functools.reduce(jnp.add, mixed)  # [B, K, G T, H]
    y = y.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4)
    return y.reshape(b, t, n, h).astype(q.dtype)
