"""Grouped-query self-attention with rotary positions and an optional key/value cache."""

import functools

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtune import ops
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy
from jaxtune.ops.attention import Mask, make_operands
from jaxtune.sharding.mesh import on_shards
from jaxtune.sharding.rules import spec


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
        cache: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends causally within segments.

        Args:
            x: [B, T, D].
            rope: cosines and sines [B, T, 1, H].
            segments: segment ids of the tokens [B, T] and of the keys, which are the cached ones
                [B, S] if there is a cache; None: one segment.
            cache: this layer's keys and values of earlier tokens, [B, K, S, H].

        Returns:
            The output, and with a cache the new keys and values to append to it, [B, K, T, H].
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
            new = (ops.rotate(k, *rope).swapaxes(1, 2), v.swapaxes(1, 2))
            y = ops.cached_attention(
                ops.rotate(q, *rope),
                new,
                cache,
                segments=segments,  # pyright: ignore[reportArgumentType]
                softmax_dtype=self.policy.softmax_dtype,
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
        q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
        mask = Mask(query_segments=segments[0], key_segments=segments[1])
        return attend(q, k, v, mask, self.policy)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, policy: Policy) -> jax.Array:
    """`ops.attention` as the policy says; on a mesh, a kernel runs on every device's own part.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H].
        mask: which key a query sees.
        policy: names the implementation and the mesh.
    """

    def call(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        return ops.attention(
            q,
            k,
            v,
            mask=mask,
            softmax_dtype=policy.softmax_dtype,
            implementation=policy.attention,
        )

    mesh = policy.mesh
    if mesh is None or mesh.size == 1:
        return call(q, k, v, mask)
    # Query heads and their key heads are cut alike, or not at all.
    cut = spec(k.shape, ("batch", "length", "key_heads", None), mesh)
    batch, length, *_ = cut
    if length is None and policy.attention in ("xla", "reference"):
        return call(q, k, v, mask)

    def ring(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        operands = make_operands(q, k, v, mask, softmax_dtype=policy.softmax_dtype)
        return ops.ring_attention(operands, "sequence", policy.attention)[0]

    def ulysses(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        return ops.ulysses_attention(q, k, v, mask, "sequence", call)

    crossing = {"ring": ring, "ulysses": ulysses}[policy.context_parallel]
    rows = jax.tree.map(lambda _: PartitionSpec(batch, length), mask)
    function = call if length is None else crossing
    return on_shards(function, mesh, (cut, cut, cut, rows), cut)(q, k, v, mask)
