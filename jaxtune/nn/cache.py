"""Keys and values of the tokens seen so far, for generation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """S slots per row, filled from the left in step for all rows (shorter prompts are left-padded).

    Attributes:
        k, v: one [n, B, S, K, H] array per stack of n layers.
        segment_ids: int32 [B, S]; 0 for padding and empty slots.
        length: int32 scalar, slots filled so far.
    """

    k: list[jax.Array]
    v: list[jax.Array]
    segment_ids: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls,
        stacks: tuple[int, ...],
        *,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "KVCache":
        """An empty cache for a model with the given stacks."""
        shape = (batch, length, num_kv_heads, head_dim)
        return cls(
            k=[jnp.zeros((n, *shape), dtype) for n in stacks],
            v=[jnp.zeros((n, *shape), dtype) for n in stacks],
            segment_ids=jnp.zeros((batch, length), jnp.int32),
            length=jnp.int32(0),
        )


def append(slots: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    """Writes `new` [B, T, ...] into `slots` [B, S, ...] from slot `length` on."""
    start = (0, length) + (0,) * (slots.ndim - 2)
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)
