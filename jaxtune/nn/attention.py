"""Grouped-query self-attention with rotary positions and an optional key/value cache."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.cache import append
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy


class Attention(nnx.Module):
    """[B, T, D] -> [B, T, D] with N query heads and K key/value heads of size H."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(Linear, bias=bias, policy=policy, rngs=rngs)
        self.head_dim = head_dim
        self.policy = policy
        self.q_proj = make(width, num_heads * head_dim, axes=("embed", "heads"))
        self.k_proj = make(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"))
        self.v_proj = make(width, num_kv_heads * head_dim, axes=("embed", "kv_heads"))
        self.o_proj = make(num_heads * head_dim, width, axes=("heads", "embed"))

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segments: tuple[jax.Array | None, jax.Array | None],
        cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends causally within segments.

        Args:
            x: [B, T, D].
            rope: cosines and sines [B, T, 1, H].
            segments: segment ids of the queries [B, T] and of the keys [B, S]; None: one segment.
            cache: this layer's keys and values [B, S, K, H] and the number of filled slots.

        Returns:
            The output and the cache's new keys and values (None without a cache).
        """
        b, t, _ = x.shape
        q, k, v = (
            project(x).reshape(b, t, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            attend = functools.partial(self._attend, segments=segments)
            y = (jax.checkpoint(attend) if self.policy.remat == "attention" else attend)(
                q, k, v, rope
            )
            new = None
        else:
            slots_k, slots_v, length = cache
            new = (append(slots_k, ops.rotate(k, *rope), length), append(slots_v, v, length))
            y = ops.attention(
                ops.rotate(q, *rope),
                *new,
                segments=segments,
                query_offset=length,
                softmax_dtype=self.policy.softmax_dtype,
                implementation="reference",
            )
        return self.o_proj(y.reshape(b, t, -1)), new

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        *,
        segments: tuple[jax.Array | None, jax.Array | None],
    ) -> jax.Array:
        return ops.attention(
            ops.rotate(q, *rope),
            ops.rotate(k, *rope),
            v,
            segments=segments,
            query_offset=0,
            softmax_dtype=jnp.dtype(self.policy.softmax_dtype),
            implementation=self.policy.attention,
        )
