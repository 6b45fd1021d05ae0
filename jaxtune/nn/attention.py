"""Grouped-query self-attention, with a prefix and a key/value cache if there are any.

Positions come in by rotation (RoPE), by slopes (ALiBi), by learnt numbers for each distance, or are
in the input already.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtune import ops
from jaxtune.nn.cache import KeysValues, Past
from jaxtune.nn.linear import Linear
from jaxtune.nn.norm import NORMS
from jaxtune.nn.params import Policy
from jaxtune.ops.attention import Mask, make_operands
from jaxtune.sharding.mesh import on_shards
from jaxtune.sharding.rules import spec

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Shapes of multi-head latent attention (`nn.latent`).

    Attributes:
        query_rank: width of the latent vector of queries; None: they have none.
        rank: width of the latent vector of keys and values.
        rope_dim: numbers of a head that are rotated; those of keys are the same for all heads.
        value_dim: numbers of a value head.
    """

    query_rank: int | None
    rank: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Shapes and switches of attention; names follow Hugging Face where it has one.

    Attributes:
        norm, norm_eps: name in `norm.NORMS` and epsilon of the model's norms.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: queries and keys are normalised before they are rotated: "head": each head,
            "width": all heads together; None: they are not.
        scale: what scores are multiplied with; None: 1 / sqrt(head_dim).
        softcap: bound of the scores (see `ops.attention.Extras`).
        alibi: a slope for each head (see `ops.attention.Extras`).
        has_sinks: whether each head has a sink, which is learnt (see `ops.attention.Extras`).
        latent: ranks and parts of heads, if keys and values come from one latent vector (see
            `nn.latent`); `head_dim` is that of queries and keys.
        causal: whether later tokens are hidden.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str = "rms"
    norm_eps: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: tuple[float, ...] | None = None
    has_sinks: bool = False
    latent: LatentConfig | None = None
    causal: bool = True


class Segments(NamedTuple):
    """Which tokens see each other: those of equal ids. None: all are equal.

    Attributes:
        queries: int32 ids of the tokens [B, T].
        keys: of the keys, which are the cached ones [B, S] if there is a cache.
        shifted: ids [B, T] of tokens and keys for the second half of the heads; None: the same.
    """

    queries: jax.Array | None
    keys: jax.Array | None
    shifted: jax.Array | None = None


def projections(
    config: AttentionConfig, policy: Policy, rngs: nnx.Rngs
) -> tuple[Linear, Linear, Linear, Linear]:
    """Those of queries, keys, values and the output."""
    c, make = config, functools.partial(Linear, policy=policy, rngs=rngs)
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return (
        make(c.hidden_size, queries, axes=("embed", "heads"), bias=c.qkv_bias),
        make(c.hidden_size, keys, axes=("embed", "kv_heads"), bias=c.qkv_bias),
        make(c.hidden_size, keys, axes=("embed", "kv_heads"), bias=c.qkv_bias),
        make(queries, c.hidden_size, axes=("heads", "embed"), bias=c.out_bias),
    )


class Attention(nnx.Module):
    """[B, T, D] -> [B, T, D] with N query heads and K key/value heads of size H."""

    def __init__(self, config: AttentionConfig, *, policy: Policy, rngs: nnx.Rngs):
        c = config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.config = c
        self.policy = policy
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(c, policy, rngs)
        self.sinks: Any = nnx.data(None)
        if c.has_sinks:
            zeros = jnp.zeros((c.num_heads,), policy.param_dtype)
            self.sinks = nnx.Param(zeros, axes=("heads",))
        self.q_norm: Any = nnx.data(None)
        self.k_norm: Any = nnx.data(None)
        if c.qk_norm is not None:
            norm = functools.partial(NORMS[c.norm], eps=c.norm_eps, policy=policy)
            wide = c.qk_norm == "width"
            self.q_norm = norm(queries if wide else c.head_dim, axis="heads" if wide else None)
            self.k_norm = norm(keys if wide else c.head_dim, axis="kv_heads" if wide else None)

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation | None,
        segments: Segments,
        past: Past = Past(),  # noqa: B008
        *,
        slots: jax.Array | None = None,
        window: int | None = None,
        relative: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Attends within segments, to earlier tokens only if the model is causal.

        Args:
            x: [B, T, D].
            rope: cosines and sines [B, T, 1, H], or fewer for a part of each head; None: heads are
                not rotated.
            segments: which tokens see each other.
            past: this layer's prefix and cache.
            slots: int32 [B, T], where in the cache the tokens will be, if there is one.
            window: see `Mask`.
            relative: see `ops.attention.Extras`; with a cache its M is that of the cache's slots.

        Returns:
            The output, and with a cache the new keys and values to append to it, [B, K, T, H].
        """
        b, t, _ = x.shape
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), None)
        y, new = mixed(
            *(q, k, v, rope, segments, past),
            policy=self.policy,
            slots=slots,
            mask=Mask(causal=self.config.causal, window=window),
            extras=self._extras() | {"relative": relative},
        )
        return self.o_proj(y.reshape(b, t, -1)), new

    def _heads(self, x: jax.Array, norm: Any) -> jax.Array:
        """[B, T, N * H] -> [B, T, N, H], normalised."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        if norm is None:
            return x.reshape(shape)
        wide = self.config.qk_norm == "width"
        return norm(x).reshape(shape) if wide else norm(x.reshape(shape))

    def _extras(self) -> dict[str, Any]:
        c = self.config
        slopes = None if c.alibi is None else jnp.asarray(c.alibi, jnp.float32)
        sinks = None if self.sinks is None else self.sinks.get_value().astype(jnp.float32)
        return {"scale": c.scale, "softcap": c.softcap, "alibi": slopes, "sinks": sinks}


def mixed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: Rotation | None,
    segments: Segments,
    past: Past,
    *,
    policy: Policy,
    slots: jax.Array | None,
    mask: Mask,
    extras: dict[str, Any],
) -> tuple[jax.Array, KeysValues | None]:
    """Attention of heads that are not rotated yet; other arguments as of `Attention`.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        mask: without segments; that of a cache is always causal.
        extras: of `ops.attention.Extras`, those of a layer.

    Returns:
        [B, T, N, H], and with a cache the new keys and values.
    """
    if past.cache is None:
        attend = functools.partial(
            _attend, segments=segments, mask=mask, policy=policy, extras=extras
        )
        wrapped = jax.checkpoint(attend) if policy.remat == "attention" else attend
        return wrapped(q, k, v, rope, past.prefix), None
    assert slots is not None
    q, k = _rotated(q, rope), _rotated(k, rope)
    new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
    y = ops.cached_attention(
        q,
        new,
        (past.prefix, past.cache),
        segments=segments[:2],  # pyright: ignore[reportArgumentType]
        slots=slots,
        window=mask.window,
        softmax_dtype=policy.softmax_dtype,
        **extras,
    )
    return y, new


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: Rotation | None,
    prefix: KeysValues | None,
    *,
    segments: Segments,
    mask: Mask,
    policy: Policy,
    extras: dict[str, Any],
) -> jax.Array:
    given = mask
    mask = dataclasses.replace(given, query_segments=segments.queries, key_segments=segments.keys)
    q, k = _rotated(q, rope), _rotated(k, rope)
    if prefix is not None:
        k, v, mask = _behind(prefix, k, v, mask)
    if segments.shifted is None:
        return attend(q, k, v, mask, policy, **extras)
    shifted = dataclasses.replace(
        given, query_segments=segments.shifted, key_segments=segments.shifted
    )
    halves = []
    for i, own in enumerate((mask, shifted)):
        numbers: dict[str, Any] = {
            name: jnp.split(extras[name], 2)[i]
            for name in ("alibi", "sinks")
            if extras.get(name) is not None
        }
        parts = [_half(x, i) for x in (q, k, v)]
        halves.append(attend(parts[0], parts[1], parts[2], own, policy, **extras | numbers))
    return jnp.concatenate(halves, axis=2)


def _half(x: jax.Array, i: int) -> jax.Array:
    """The first or second half of the heads of [B, T, N, H]; a single one serves both."""
    return x if x.shape[2] == 1 else jnp.split(x, 2, axis=2)[i]


def shifted_groups(positions: jax.Array, size: int) -> Segments:
    """Groups of LongLoRA's shifted sparse attention (Chen et al. 2023, arXiv 2309.12307, 3.2).

    An example's tokens are cut into groups of `size`, for the second half of the heads into groups
    that begin half a group earlier. As in the authors' flash code the first and the last of these
    are shorter; joined, as in the paper's listing, tokens would see later ones.

    Args:
        positions: int32 [B, T], restarting in each packed example.
        size: tokens of a group, even.
    """
    # A group is named after the place in the row where it begins.
    starts = jnp.arange(positions.shape[1]) - positions
    whole = starts + positions // size * size
    half = size // 2
    shifted = starts + jnp.maximum((positions + half) // size * size - half, 0)
    return Segments(whole, whole, shifted)


def _behind(
    prefix: KeysValues, k: jax.Array, v: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array, Mask]:
    """Keys and values [B, P + S, K, H] that begin with a prefix, and their mask."""
    length = prefix[0].shape[0]
    k, v = (
        jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)), x], axis=1)
        for first, x in zip(prefix, (k, v), strict=True)
    )
    segments = mask.key_segments
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (length, 0)))
    return k, v, dataclasses.replace(mask, prefix=length, key_segments=segments)


def _rotated(x: jax.Array, rope: Rotation | None) -> jax.Array:
    return x if rope is None else ops.rotate(x, *rope)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    policy: Policy,
    *,
    alibi: jax.Array | None = None,
    relative: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`ops.attention` as the policy says; on a mesh, a kernel runs on every device's own part.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H].
        mask: which key a query sees.
        policy: names the implementation and the mesh.
        alibi, relative, sinks, scale, softcap: see `ops.attention.Extras`; the arrays are of all
            heads.
    """
    per_head = {"alibi": alibi, "relative": relative, "sinks": sinks}
    extras: dict[str, Any] = {"scale": scale, "softcap": softcap}
    extras["softmax_dtype"] = policy.softmax_dtype

    def call(
        q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, per_head: dict[str, Any]
    ) -> jax.Array:
        return ops.attention(
            q, k, v, mask=mask, implementation=policy.attention, **per_head, **extras
        )

    mesh = policy.mesh
    if mesh is None or mesh.size == 1:
        return call(q, k, v, mask, per_head)
    # Query heads and their key heads are cut alike, or not at all.
    cut = spec(k.shape, ("batch", "length", "key_heads", None), mesh)
    batch, length, heads, _ = cut
    if length is None and policy.attention in ("xla", "reference"):
        return call(q, k, v, mask, per_head)

    def ring(
        q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, per_head: dict[str, Any]
    ) -> jax.Array:
        operands = make_operands(q, k, v, mask, **per_head, **extras)
        return ops.ring_attention(operands, "sequence", policy.attention)[0]

    def ulysses(
        q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, per_head: dict[str, Any]
    ) -> jax.Array:
        def own(numbers: jax.Array) -> jax.Array:  # of the heads that this device will get
            shards = jax.lax.axis_size("sequence")
            return numbers.reshape(shards, -1)[jax.lax.axis_index("sequence")]

        whole_rows = functools.partial(call, per_head=jax.tree.map(own, per_head))
        return ops.ulysses_attention(q, k, v, mask, "sequence", whole_rows)

    crossing = {"ring": ring, "ulysses": ulysses}[policy.context_parallel]
    rows = jax.tree.map(lambda _: PartitionSpec(batch, length), mask)
    function = call if length is None else crossing
    numbers = jax.tree.map(lambda _: PartitionSpec(heads), per_head)
    specs = (cut, cut, cut, rows, numbers)
    return on_shards(function, mesh, specs, cut)(q, k, v, mask, per_head)
