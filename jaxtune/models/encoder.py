"""The encoder that BERT and its kin share: embeddings of three kinds, layers that see both ways.

It has no head of its own; `heads` puts one for labels behind it.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxtune.models.block import BlockConfig, LayerKind
from jaxtune.nn.attention import Attention, Segments
from jaxtune.nn.cache import Past
from jaxtune.nn.embed import Embed
from jaxtune.nn.linear import Linear
from jaxtune.nn.mlp import PlainMLP
from jaxtune.nn.norm import NORMS
from jaxtune.nn.params import Policy
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
class EncoderConfig(BlockConfig):
    """Shapes and switches of an encoder.

    Attributes:
        layer_kinds: of each layer; they are all alike.
        embedding_size: width of the embeddings, which another one of the layers makes project.
        max_positions: tokens of an example, at most.
        position_rows: rows of the table of positions, of which the last `max_positions` are used.
        type_rows: rows of the table that tells apart the texts of a pair.
        tie_embeddings: whether an output head uses the embedding; there is no such head.
    """

    vocab_size: int
    num_layers: int
    layer_kinds: tuple[LayerKind, ...]
    embedding_size: int
    max_positions: int
    position_rows: int
    type_rows: int
    tie_embeddings: bool = False


class PostNormBlock(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)) of that."""

    def __init__(self, config: EncoderConfig, policy: Policy, rngs: nnx.Rngs):
        c = config
        norm = functools.partial(NORMS[c.norm], c.hidden_size, c.norm_eps, policy=policy)
        self.policy = policy
        self.attn = Attention(c, policy=policy, rngs=rngs)
        self.attn_norm = norm()
        self.mlp = PlainMLP(
            c.hidden_size,
            c.intermediate_size,
            activation=c.activation,
            bias=c.mlp_bias,
            policy=policy,
            rngs=rngs,
        )
        self.mlp_norm = norm()

    def __call__(self, x: jax.Array, segments: Segments) -> jax.Array:
        """[B, T, D] -> [B, T, D]; tokens see those of their own segment."""
        mesh = self.policy.mesh
        y, _ = self.attn(moved(x, RESIDUAL, TOKENS, mesh), None, segments)
        x = self.attn_norm(x + moved(y, TOKENS, RESIDUAL, mesh))
        y = self.mlp(moved(x, RESIDUAL, TOKENS, mesh))
        return self.mlp_norm(x + moved(y, TOKENS, RESIDUAL, mesh))


class Encoder(nnx.Module):
    """Tokens in, hidden states out.

    The attributes that decoders have for prompts and for generated text are there and empty.
    """

    def __init__(self, config: EncoderConfig, policy: Policy, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.policy = policy
        self.stacks = stack_sizes(c.num_layers, policy, c.layer_kinds)
        embed = functools.partial(Embed, width=c.embedding_size, policy=policy, rngs=rngs)
        self.embed = embed(c.vocab_size)
        self.positions = embed(c.position_rows)
        self.types = embed(c.type_rows)
        self.embed_norm = NORMS[c.norm](c.embedding_size, c.norm_eps, policy=policy)
        self.embed_proj: Any = nnx.data(None)
        if c.embedding_size != c.hidden_size:
            shape = (c.embedding_size, c.hidden_size)
            self.embed_proj = Linear(
                *shape, axes=("embed", "mlp"), bias=True, policy=policy, rngs=rngs
            )
        makers = [functools.partial(PostNormBlock, c, policy)] * len(self.stacks)
        self.layers = make_stacks(makers, self.stacks, rngs)
        self.lm_head: Any = nnx.data(None)
        self.num_virtual_tokens = 0
        self.max_tokens = c.max_positions
        self.attention_group = 0

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        types: jax.Array,
    ) -> jax.Array:
        """Outputs of the last layer, [B, T, D] in the compute dtype.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], restarting in each packed example.
            segment_ids: int32 [B, T]; tokens see those of their own segment. None: each row is one.
            types: int32 [B, T], which text of a pair a token belongs to.
        """
        c, mesh = self.config, self.policy.mesh
        x = self.embed(tokens, segment_ids)
        x = x + self.positions(positions + (c.position_rows - c.max_positions)) + self.types(types)
        x = self.embed_norm(x)
        x = x if self.embed_proj is None else self.embed_proj(x)

        def apply(
            block: PostNormBlock, kind: LayerKind, x: jax.Array, segments: Segments, past: Past
        ) -> tuple[jax.Array, None]:
            return block(x, segments), None

        x = constrained(x, OUTER_RESIDUAL, mesh)
        past = [Past() for _ in self.stacks]
        segments = Segments(segment_ids, segment_ids)
        x, _ = scan_layers(self.layers, x, segments, apply, past, self.policy, c.layer_kinds)
        return moved(x, OUTER_RESIDUAL, OUTER_TOKENS, mesh)
