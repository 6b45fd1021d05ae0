"""The decoder that all families share: embedding, layers, norm, head.

A switch may enter here or in `block.py` only if two families need it; otherwise the family writes
its own block.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.models.block import Block, BlockConfig, LayerKind, unchanged
from jaxtune.nn.attention import Segments, shifted_groups
from jaxtune.nn.cache import KeysValues, KVCache, Past, prefixes
from jaxtune.nn.embed import Embed
from jaxtune.nn.linear import Linear
from jaxtune.nn.norm import NORMS
from jaxtune.nn.params import Policy
from jaxtune.nn.rope import rope_table
from jaxtune.nn.stack import by_stack, make_stacks, scan_layers, stack_sizes
from jaxtune.sharding.rules import (
    OUTER_RESIDUAL,
    OUTER_TOKENS,
    constrained,
    moved,
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """Shapes and switches of a decoder; names follow Hugging Face where it has one.

    Attributes:
        layer_kinds: of each layer.
        embed_scale: factor of the embeddings.
        position_rows: rows of the table of learned positions, which are added to the embeddings
            (0: there is none); the table's last `max_positions` rows are used.
        head_bias: whether the output head has a bias, which is a row more of its matrix.
        logits: what becomes of the product with the output matrix.
    """

    vocab_size: int
    num_layers: int
    layer_kinds: tuple[LayerKind, ...]
    max_positions: int
    tie_embeddings: bool
    embed_scale: float = 1.0
    position_rows: int = 0
    head_bias: bool = False
    logits: ops.Logits = ops.Logits()


class Decoder(nnx.Module):
    """Tokens in, hidden states or logits out.

    The slot `prefix` holds None or a module that gives the keys and values [L, P, K*H] which all
    tokens see in each of the L layers. The slot `edit` holds None or a module that edits the
    outputs of layers at some tokens of prompts: `places` says at which, `values` gives a tree of
    arrays [L, ...], and it is called with an output, its layer's values and the places. With an
    `attention_group` above 0, which a training step sets, half of the heads attend in groups of so
    many tokens, the others in shifted ones.
    """

    def __init__(
        self,
        config: DecoderConfig,
        policy: Policy,
        rngs: nnx.Rngs,
        *,
        block: Callable[[DecoderConfig, Policy, nnx.Rngs], nnx.Module] = Block,
        output: Callable[[jax.Array], jax.Array] = unchanged,
    ):
        """Describes or makes the model.

        Args:
            config: its shapes and switches.
            policy: how it is computed.
            rngs: of the first values.
            block: what a layer is.
            output: what is made of the output matrix, [V, D] or [D, V], before it is used.
        """
        c = config
        self.config = c
        self.policy = policy
        self.output = output
        self.stacks = stack_sizes(c.num_layers, policy, c.layer_kinds)
        embed = functools.partial(Embed, width=c.hidden_size, policy=policy, rngs=rngs)
        self.embed = embed(c.vocab_size)
        self.positions: Any = embed(c.position_rows) if c.position_rows else nnx.data(None)
        self.embed_norm: Any = nnx.data(None)  # a family may put one here
        firsts = (c.layer_kinds[sum(self.stacks[:i])] for i in range(len(self.stacks)))
        configs = (dataclasses.replace(c, moe=None) if kind.dense else c for kind in firsts)
        makers = [functools.partial(block, config, policy) for config in configs]
        self.layers = make_stacks(makers, self.stacks, rngs)
        self.norm = NORMS[c.norm](c.hidden_size, c.norm_eps, policy=policy)
        self.lm_head: Any = nnx.data(None)
        if not c.tie_embeddings:
            shape = (c.hidden_size, c.vocab_size)
            self.lm_head = Linear(
                *shape, axes=("embed", "vocab"), policy=policy, rngs=rngs, bias=c.head_bias
            )
        self.prefix: Any = nnx.data(None)
        self.edit: Any = nnx.data(None)
        self.attention_group = 0

    @property
    def num_virtual_tokens(self) -> int:
        """Positions at the start of every example that its tokens leave to a prompt."""
        return 0 if self.embed.prompt is None else self.embed.prompt.length

    @property
    def max_tokens(self) -> int:
        """Tokens that an example may have: positions that no prefix and no prompt takes."""
        taken = 0 if self.prefix is None else self.prefix.length
        return self.config.max_positions - taken - self.num_virtual_tokens

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: KVCache | None = None,
        prompts: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Normalised outputs of the last layer; see `hidden_and_new`.

        Returns:
            [B, T, D] in the compute dtype, followed by a one if the head has a bias, and the new
            cache.
        """
        return self.hidden_and_new(tokens, positions, segment_ids, cache, prompts)[:2]

    def hidden_and_imbalance(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        prompts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the mean over layers of `MoE.imbalance`, float32 [B, T]."""
        x, _, new = self.hidden_and_new(tokens, positions, segment_ids, None, prompts)
        return x, jnp.concatenate([found for found in new if found is not None]).mean(axis=0)

    def hidden_and_new(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
        prompts: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None, list[Any]]:
        """Runs the layers.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], restarting in each packed example.
            segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment only.
                None: each row is one segment (not with a cache).
            cache: keys and values of earlier tokens; the new ones are appended.
            prompts: int32 [B, T] or [B, 1], how many tokens of each token's example are its prompt,
                for the slot `edit`; None: these tokens are in no prompt.

        Returns:
            What `hidden` does, and what the layers of each stack gave besides.
        """
        segments, past = Segments(segment_ids, segment_ids), [Past() for _ in self.stacks]
        slots = places = None
        if self.edit is not None and prompts is not None:
            places = self.edit.places(positions, prompts)
            past = [Past(edit=found) for found in by_stack(self.edit.values(), self.stacks)]
        if self.attention_group:
            segments = shifted_groups(positions, self.attention_group)
        if self.prefix is not None:
            positions = positions + self.prefix.length
            found = zip(past, self._prefixes(), strict=True)
            past = [known._replace(prefix=prefix) for known, prefix in found]
        ropes = list(dict.fromkeys(kind.rope for kind in self.config.layer_kinds if kind.rope))
        tables = tuple(rope_table(positions, rope) for rope in ropes)
        if cache is not None:
            segments = Segments(segment_ids, cache.segment_ids)
            kept = zip(past, cache.k, cache.v, strict=True)
            past = [known._replace(cache=(k, v)) for known, k, v in kept]
            slots = jnp.broadcast_to(cache.length + jnp.arange(tokens.shape[1]), tokens.shape)

        def apply(
            block: Any, kind: LayerKind, x: jax.Array, rows: tuple, past: Past
        ) -> tuple[jax.Array, Any]:
            tables, segments, slots, places = rows
            table = None if kind.rope is None else tables[ropes.index(kind.rope)]
            x, new = block(x, table, segments, past, slots=slots, window=kind.window)
            return x if past.edit is None else self.edit(x, past.edit, places), new

        x = constrained(
            self._embedded(tokens, positions, segment_ids), OUTER_RESIDUAL, self.policy.mesh
        )
        rows = (tables, segments, slots, places)
        kinds = self.config.layer_kinds
        x, new = scan_layers(self.layers, x, rows, apply, past, self.policy, kinds)
        if cache is not None and segment_ids is not None:
            # Once, after all layers: XLA copies a buffer that is read and written in one layer.
            cache = cache.appended(new, segment_ids)
        x = self.norm(x)
        if self.config.head_bias:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return moved(x, OUTER_RESIDUAL, OUTER_TOKENS, self.policy.mesh), cache, new

    def _embedded(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """The first layer's input, [B, T, D]."""
        c, x = self.config, self.embed(tokens, segment_ids)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        x = self.embed.with_prompt(x, positions)
        if self.positions is not None:
            rows = positions + (c.position_rows - c.max_positions)
            x = x + self.positions(rows, segment_ids)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _prefixes(self) -> list[KeysValues]:
        """The keys and values of every stack that its layers see before all tokens."""
        dtype = self.policy.compute_dtype
        return prefixes(self.prefix(), self.stacks, head_dim=self.config.head_dim, dtype=dtype)

    def head(self) -> tuple[jax.Array, bool]:
        """The output matrix, and whether it is [V, D] (a tied table) instead of [D, V]."""
        if self.lm_head is None:
            return self.output(_matrix(self.embed, self.embed.table.get_value())), True
        weight = self.output(_matrix(self.lm_head, self.lm_head.kernel.get_value()))
        if self.config.head_bias:
            weight = jnp.concatenate([weight, self.lm_head.bias.get_value()[None]])
        return weight, False

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return logits_of(hidden, self.head(), self.config.logits)

    def make_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots."""
        c = self.config
        return KVCache.create(
            self.stacks,
            batch=batch,
            length=length,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=self.policy.compute_dtype,
        )


def logits_of(hidden: jax.Array, head: tuple[jax.Array, bool], form: ops.Logits) -> jax.Array:
    """float32 [..., V] of hidden states [..., D], by a model's `head()`."""
    weight, transposed = head
    weight = weight.astype(hidden.dtype)
    products = ops.dot(hidden, weight.T if transposed else weight, jnp.float32)
    return form.of(products)


def _matrix(layer: Any, weight: jax.Array) -> jax.Array:
    """The output matrix of a layer, or what the adapter in its slot makes of it."""
    return weight if layer.adapter is None else layer.adapter.matrix(weight)
