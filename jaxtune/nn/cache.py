"""What a layer is given besides its tokens: a prefix, the cache of earlier tokens, an edit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

KeysValues = tuple[jax.Array, jax.Array]


class Past(NamedTuple):
    """What a layer knows besides its tokens; for a stack of layers with a leading axis over them.

    Attributes:
        prefix: keys and values [P, K, H] that every query sees, whatever its segment and without
            rotation; None: there are none.
        cache: keys and values [B, K, S, H] of earlier tokens; None: there are none.
        edit: with what the layer's output is edited; None: it is not.
        across: keys and values [B, S, K, H] of another sequence, computed once; None: they are not.
    """

    prefix: KeysValues | None = None
    cache: KeysValues | None = None
    edit: Any = None
    across: KeysValues | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """S slots per row, filled from the left in step for all rows (shorter prompts are left-padded).

    Attributes:
        k, v: one [n, B, K, S, H] array per stack of n layers.
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
        shape = (batch, num_kv_heads, length, head_dim)
        return cls(
            k=[jnp.zeros((n, *shape), dtype) for n in stacks],
            v=[jnp.zeros((n, *shape), dtype) for n in stacks],
            segment_ids=jnp.zeros((batch, length), jnp.int32),
            length=jnp.int32(0),
        )

    def appended(self, new: Sequence[KeysValues], segment_ids: jax.Array) -> "KVCache":
        """The cache with new tokens: keys and values [n, B, K, T, H] of each stack, ids [B, T]."""
        length = self.length
        return KVCache(
            k=[append(old, k, length, 3) for old, (k, _) in zip(self.k, new, strict=True)],
            v=[append(old, v, length, 3) for old, (_, v) in zip(self.v, new, strict=True)],
            segment_ids=append(self.segment_ids, segment_ids, length, 1),
            length=length + segment_ids.shape[1],
        )


def append(slots: jax.Array, new: jax.Array, length: jax.Array, axis: int) -> jax.Array:
    """Writes `new` into `slots`, which differ along `axis` only, from slot `length` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), length, axis)


def prefixes(
    found: KeysValues, stacks: Sequence[int], *, head_dim: int, dtype: DTypeLike
) -> list[KeysValues]:
    """The prefixes of all stacks, [n, P, K, H] each, from those of all layers [L, P, K*H]."""
    heads = [x.astype(dtype).reshape(*x.shape[:2], -1, head_dim) for x in found]
    keys, values = (jnp.split(x, np.cumsum(stacks[:-1])) for x in heads)
    return list(zip(keys, values, strict=True))
