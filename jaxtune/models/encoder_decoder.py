"""Encoder-decoders as T5 is one: an encoder reads a source, a decoder writes a target.

Both have their layers in one list of stacks, the encoder's first, so that what holds for layers
(stacks, adapters, weight tables) holds for these. Layers are numbered through: the decoder's first
one follows the encoder's last. A layer's parameters are under `encoder` or `decoder`.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.models.block import Block, BlockConfig, LayerKind, mlp_of
from jaxtune.models.decoder import logits_of
from jaxtune.nn.attention import Attention, Segments
from jaxtune.nn.cache import KeysValues, KVCache, Past
from jaxtune.nn.cross import CrossAttention
from jaxtune.nn.embed import Embed
from jaxtune.nn.linear import Linear
from jaxtune.nn.norm import NORMS
from jaxtune.nn.params import Policy
from jaxtune.nn.relative import Buckets, RelativeBias
from jaxtune.nn.stack import make_stacks, scan_layers, stack_sizes
from jaxtune.sharding.rules import (
    OUTER_RESIDUAL,
    OUTER_TOKENS,
    RESIDUAL,
    TOKENS,
    constrained,
    moved,
)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(BlockConfig):
    """Shapes and switches of an encoder and a decoder that differ only in their number of layers.

    Attributes:
        num_layers: of both.
        layer_kinds: of each layer; those of the decoder cross.
        tie_embeddings: the output head is the embedding.
        buckets, furthest: of the distances of tokens (see `nn.relative.Buckets`).
        start_token: what stands before a target.
        max_positions: tokens of the rows that the model was trained on; it can have more.
        position_rows: 0, there are no learned positions.
        logits: what becomes of the product with the output matrix.
    """

    vocab_size: int
    num_layers: int
    layer_kinds: tuple[LayerKind, ...]
    tie_embeddings: bool
    buckets: int
    furthest: int
    start_token: int
    max_positions: int
    position_rows: int = 0
    logits: ops.Logits = ops.Logits()

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder, the first ones."""
        return sum(not kind.crosses for kind in self.layer_kinds)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceCache:
    """What a decoder keeps while it writes.

    Attributes:
        own: keys and values of the decoder's tokens, of its stacks only.
        across: keys and values of the source, [n, B, S, K, H] of each of these stacks.
        source_segments: int32 [B, S]; 0 for padding.
    """

    own: KVCache
    across: list[KeysValues]
    source_segments: jax.Array

    @property
    def length(self) -> jax.Array:
        """Tokens written so far, int32."""
        return self.own.length


class EncoderLayer(nnx.Module):
    """A block that sees both ways."""

    def __init__(self, config: EncoderDecoderConfig, policy: Policy, rngs: nnx.Rngs):
        self.encoder = Block(dataclasses.replace(config, causal=False), policy, rngs)


class DecoderLayer(nnx.Module):
    """A block that also attends to the source."""

    def __init__(self, config: EncoderDecoderConfig, policy: Policy, rngs: nnx.Rngs):
        self.decoder = CrossBlock(config, policy, rngs)


class CrossBlock(nnx.Module):
    """x + attention(norm(x)), then + attention to the source(norm(x)), then + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, policy: Policy, rngs: nnx.Rngs):
        norm = functools.partial(
            NORMS[config.norm], config.hidden_size, config.norm_eps, policy=policy
        )
        self.policy = policy
        self.attn_norm = norm()
        self.attn = Attention(config, policy=policy, rngs=rngs)
        self.cross_norm = norm()
        self.cross = CrossAttention(config, policy=policy, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = mlp_of(config, policy, rngs)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None,
        segments: Segments,
        of_source: Segments,
        past: Past,
        **options: Any,
    ) -> tuple[jax.Array, KeysValues | None]:
        """The output and the new cache.

        Args:
            x: [B, T, D].
            memory: the encoder's output [B, S, D]; None: `past` has what is made of it.
            segments: which tokens of the target see each other.
            of_source: which tokens of the target see which of the source.
            past: of this layer.
            options: those of `Attention`.
        """
        mesh = self.policy.mesh
        normed = moved(self.attn_norm(x), RESIDUAL, TOKENS, mesh)
        y, new = self.attn(normed, None, segments, past, **options)
        x = x + moved(y, TOKENS, RESIDUAL, mesh)
        across = past.across if memory is None else self.cross.keys_values(memory)
        assert across is not None
        y = self.cross(moved(self.cross_norm(x), RESIDUAL, TOKENS, mesh), across, of_source)
        x = x + moved(y, TOKENS, RESIDUAL, mesh)
        y = self.mlp(moved(self.mlp_norm(x), RESIDUAL, TOKENS, mesh))
        return x + moved(y, TOKENS, RESIDUAL, mesh), new


class EncoderDecoder(nnx.Module):
    """A source and the tokens of a target in, hidden states or logits of these out.

    The attributes that decoders have for prompts are there and empty.
    """

    def __init__(self, config: EncoderDecoderConfig, policy: Policy, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.policy = policy
        self.stacks = stack_sizes(c.num_layers, policy, c.layer_kinds)
        self.embed = Embed(c.vocab_size, c.hidden_size, policy=policy, rngs=rngs)
        firsts = [c.layer_kinds[sum(self.stacks[:i])] for i in range(len(self.stacks))]
        kinds = [DecoderLayer if first.crosses else EncoderLayer for first in firsts]
        makers = [functools.partial(kind, c, policy) for kind in kinds]
        self.layers = make_stacks(makers, self.stacks, rngs)
        self.encoder_stacks = kinds.count(EncoderLayer)
        norm = functools.partial(NORMS[c.norm], c.hidden_size, c.norm_eps, policy=policy)
        bias = functools.partial(RelativeBias, c.num_heads, policy=policy)
        both, one = (
            Buckets(count=c.buckets, furthest=c.furthest, both_ways=way) for way in (True, False)
        )
        self.encoder_bias, self.encoder_norm = bias(both), norm()
        self.decoder_bias, self.norm = bias(one), norm()
        self.lm_head: Any = nnx.data(None)
        if not c.tie_embeddings:
            shape = (c.hidden_size, c.vocab_size)
            self.lm_head = Linear(*shape, axes=("embed", "vocab"), policy=policy, rngs=rngs)
        self.num_virtual_tokens = 0
        self.max_tokens = 1 << 30
        self.attention_group = 0

    def encoded(self, source: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """The encoder's normalised output, [B, S, D] in the compute dtype.

        Args:
            source: int32 [B, S].
            segment_ids: int32 [B, S]; tokens see those of their own segment. 0 is padding.
        """
        relative = self.encoder_bias(source.shape[1])

        def apply(
            layer: EncoderLayer, kind: LayerKind, x: jax.Array, segments: Segments, past: Past
        ) -> tuple[jax.Array, None]:
            return layer.encoder(x, None, segments, past, relative=relative)[0], None

        x = constrained(self.embed(source, segment_ids), OUTER_RESIDUAL, self.policy.mesh)
        stacks, kinds = self._encoder()
        segments = Segments(segment_ids, segment_ids)
        past = [Past() for _ in stacks]
        x, _ = scan_layers(stacks, x, segments, apply, past, self.policy, kinds)
        # The residual's tokens come together for the keys of every decoder layer.
        return moved(self.encoder_norm(x), OUTER_RESIDUAL, OUTER_TOKENS, self.policy.mesh)

    def decoded(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        memory: jax.Array,
        source_segments: jax.Array,
    ) -> jax.Array:
        """The decoder's normalised output, [B, T, D] in the compute dtype.

        Args:
            tokens: int32 [B, T], each target behind its start token.
            segment_ids: int32 [B, T]; a token sees itself and earlier ones of its segment, and the
                whole source of it.
            memory: what `encoded` gave, [B, S, D].
            source_segments: int32 [B, S].
        """
        past = [Past() for _ in self.stacks[self.encoder_stacks :]]
        relative = self.decoder_bias(tokens.shape[1])
        segments = Segments(segment_ids, segment_ids), Segments(segment_ids, source_segments)
        return self._decode(tokens, memory, *segments, past, relative=relative)[0]

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: SourceCache,
    ) -> tuple[jax.Array, SourceCache]:
        """`decoded` behind earlier tokens: what `Decoder.hidden` is with a cache.

        Args:
            tokens: int32 [B, T].
            positions: not looked at: a token's place in the cache is its position.
            segment_ids: int32 [B, T], those of the sources.
            cache: of the source and earlier tokens; the new ones are appended.
        """
        del positions
        own = cache.own
        known = zip(own.k, own.v, cache.across, strict=True)
        past = [Past(cache=(k, v), across=across) for k, v, across in known]
        slots = jnp.broadcast_to(own.length + jnp.arange(tokens.shape[1]), tokens.shape)
        relative = self.decoder_bias(own.segment_ids.shape[1])
        of_source = Segments(segment_ids, cache.source_segments)
        segments = Segments(segment_ids, own.segment_ids)
        x, new = self._decode(
            tokens, None, segments, of_source, past, slots=slots, relative=relative
        )
        grown = own.appended(new, segment_ids)
        return x, dataclasses.replace(cache, own=grown)

    def start(self, source: jax.Array, segment_ids: jax.Array, slots: int) -> SourceCache:
        """A cache with room for so many tokens, before the first one.

        Args:
            source: int32 [B, S].
            segment_ids: int32 [B, S]; 0 for padding, else 1.
            slots: of the target, its start token included.
        """
        memory = self.encoded(source, segment_ids)

        def apply(
            layer: DecoderLayer, kind: LayerKind, x: jax.Array, rows: None, past: Past
        ) -> tuple[jax.Array, KeysValues]:
            return x, layer.decoder.cross.keys_values(x)

        stacks, kinds = self._decoder()
        past = [Past() for _ in stacks]
        _, across = scan_layers(stacks, memory, None, apply, past, self.policy, kinds)
        return SourceCache(self.make_cache(len(source), slots), across, segment_ids)

    def make_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots, of the decoder's own tokens."""
        c = self.config
        return KVCache.create(
            self.stacks[self.encoder_stacks :],
            batch=batch,
            length=length,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=self.policy.compute_dtype,
        )

    def head(self) -> tuple[jax.Array, bool]:
        """The output matrix, and whether it is [V, D] (a tied table) instead of [D, V]."""
        if self.lm_head is None:
            return self.embed.table.get_value(), True
        return self.lm_head.kernel.get_value(), False

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return logits_of(hidden, self.head(), self.config.logits)

    def _encoder(self) -> tuple[list[nnx.Module], tuple[LayerKind, ...]]:
        """Stacks and kinds of the encoder's layers."""
        kinds = self.config.layer_kinds[: self.config.encoder_layers]
        return list(self.layers)[: self.encoder_stacks], kinds

    def _decoder(self) -> tuple[list[nnx.Module], tuple[LayerKind, ...]]:
        """Stacks and kinds of the decoder's layers."""
        kinds = self.config.layer_kinds[self.config.encoder_layers :]
        return list(self.layers)[self.encoder_stacks :], kinds

    def _decode(
        self,
        tokens: jax.Array,
        memory: jax.Array | None,
        segments: Segments,
        of_source: Segments,
        past: list[Past],
        **options: Any,
    ) -> tuple[jax.Array, list[Any]]:
        """The decoder's output, and what its stacks append to their caches."""

        def apply(
            layer: DecoderLayer, kind: LayerKind, x: jax.Array, rows: None, past: Past
        ) -> tuple[jax.Array, KeysValues | None]:
            return layer.decoder(x, memory, segments, of_source, past, **options)

        x = constrained(self.embed(tokens, segments.queries), OUTER_RESIDUAL, self.policy.mesh)
        stacks, kinds = self._decoder()
        x, new = scan_layers(stacks, x, None, apply, past, self.policy, kinds)
        return moved(self.norm(x), OUTER_RESIDUAL, OUTER_TOKENS, self.policy.mesh), new
