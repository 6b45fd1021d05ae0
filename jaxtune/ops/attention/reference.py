"""Dense attention in float32: every score is materialised."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune.ops.attention.mask import visible


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: tuple[jax.Array | None, jax.Array | None],
    query_offset: int | jax.Array,
    softmax_dtype: DTypeLike,
) -> jax.Array:
    """See `ops.attention`."""
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    mask = visible(query_offset + jnp.arange(t), jnp.arange(s), *segments)
    scores = jnp.where(mask[:, None, None], scores * h**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(softmax_dtype)
    y = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return y.reshape(b, t, n, h).astype(q.dtype)
