"""Which key a query sees."""

import jax


def visible(
    query_index: jax.Array,
    key_index: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    """Boolean [B or 1, T, S]: the key is not later than the query and in its segment.

    Args:
        query_index, key_index: int32 [T] and [S], positions on the key axis.
        query_segments, key_segments: int32 [B, T] and [B, S], or None for one segment.
    """
    causal = (query_index[:, None] >= key_index[None, :])[None]
    if query_segments is None or key_segments is None:
        return causal
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])
