"""Attention: one function, several implementations.

`reference` is dense and float32, the oracle of the tests; `xla` works in blocks, skips those above
the diagonal, and saves only the inputs, the output and the log-sum-exp. Decoding has a function of
its own, `cached.py`, because the cache is a second set of keys.
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune.ops.attention.reference import attention as _reference
from jaxtune.ops.attention.xla import attention as _xla

IMPLEMENTATIONS = MappingProxyType({"reference": _reference, "xla": _xla})


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: tuple[jax.Array | None, jax.Array | None] = (None, None),
    query_offset: int | jax.Array = 0,
    softmax_dtype: DTypeLike = jnp.float32,
    implementation: str = "xla",
) -> jax.Array:
    """Causal attention within segments: softmax(q k^T / sqrt(H)) v.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; each key head serves N / K consecutive query heads.
        segments: int32 ids of the queries [B, T] and keys [B, S]; a query sees keys of its own
            segment only. (None, None): one segment.
        query_offset: position of the first query on the key axis (tokens in the cache).
        softmax_dtype: dtype in which probabilities meet the values.
        implementation: a name of `IMPLEMENTATIONS`; a named one never falls back.

    Returns:
        [B, T, N, H] in q's dtype.

    Raises:
        NotImplementedError: the implementation lacks what is asked for.
    """
    return IMPLEMENTATIONS[implementation](
        q, k, v, segments=segments, query_offset=query_offset, softmax_dtype=softmax_dtype
    )
