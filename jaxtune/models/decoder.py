"""The pre-norm decoder that Llama-like families share.

A switch may enter here only if two families need it; otherwise the family writes its own block.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.attention import Attention
from jaxtune.nn.cache import KVCache, append
from jaxtune.nn.embed import Embed
from jaxtune.nn.linear import Linear
from jaxtune.nn.mlp import MLP
from jaxtune.nn.norm import RMSNorm
from jaxtune.nn.params import Policy
from jaxtune.nn.rope import Rope, rope_table
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
class DecoderConfig:
    """Shapes and switches of a decoder; names follow Hugging Face where it has one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    activation: str
    max_positions: int
    rope: Rope


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(x)).

    On a mesh the residual and its norms are cut along the tokens over the tensor axis too, which
    would compute them as often as it has shards (Korthikanti et al. 2022, arXiv 2205.05198).
    """

    def __init__(self, config: DecoderConfig, policy: Policy, rngs: nnx.Rngs):
        c = config
        self.policy = policy
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps, policy=policy)
        self.attn = Attention(
            c.hidden_size,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            bias=c.attention_bias,
            policy=policy,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps, policy=policy)
        self.mlp = MLP(
            c.hidden_size,
            c.intermediate_size,
            activation=c.activation,
            bias=c.mlp_bias,
            policy=policy,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, rope: tuple, segments: tuple, cache: tuple | None
    ) -> tuple[jax.Array, tuple | None]:
        mesh = self.policy.mesh
        normed = moved(self.attn_norm(x), RESIDUAL, TOKENS, mesh)
        y, cache = self.attn(normed, rope, segments, cache)
        x = x + moved(y, TOKENS, RESIDUAL, mesh)
        y = self.mlp(moved(self.mlp_norm(x), RESIDUAL, TOKENS, mesh))
        return x + moved(y, TOKENS, RESIDUAL, mesh), cache


class Decoder(nnx.Module):
    """Tokens in, hidden states or logits out."""

    def __init__(self, config: DecoderConfig, policy: Policy, rngs: nnx.Rngs):
        self.config = config
        self.policy = policy
        self.stacks = stack_sizes(config.num_layers, policy)
        self.embed = Embed(config.vocab_size, config.hidden_size, policy=policy, rngs=rngs)
        self.layers = make_stacks(functools.partial(Block, config, policy), self.stacks, rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, policy=policy)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            shape = (config.hidden_size, config.vocab_size)
            self.lm_head = Linear(*shape, axes=("embed", "vocab"), policy=policy, rngs=rngs)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Normalised outputs of the last layer.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], restarting in each packed example.
            segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment only.
                None: each row is one segment (not with a cache).
            cache: keys and values of earlier tokens; the new ones are appended.

        Returns:
            [B, T, D] in the compute dtype, and the new cache.
        """
        rope = rope_table(positions, self.config.rope)
        key_segments, caches = segment_ids, None
        if cache is not None:
            key_segments, caches = cache.segment_ids, list(zip(cache.k, cache.v, strict=True))

        def apply(block: Block, x: jax.Array, rows: tuple, slots: Any) -> tuple[jax.Array, Any]:
            rope, segments = rows
            return block(x, rope, segments, slots)

        x = constrained(self.embed(tokens, segment_ids), OUTER_RESIDUAL, self.policy.mesh)
        rows = (rope, (segment_ids, key_segments))
        x, new = scan_layers(self.layers, x, rows, apply, caches, self.policy)
        if cache is not None and segment_ids is not None:
            # Once, after all layers: XLA copies a buffer that is read and written in one layer.
            length = cache.length
            cache = KVCache(
                k=[append(old, k, length, 3) for old, (k, _) in zip(cache.k, new, strict=True)],
                v=[append(old, v, length, 3) for old, (_, v) in zip(cache.v, new, strict=True)],
                segment_ids=append(cache.segment_ids, segment_ids, length, 1),
                length=length + tokens.shape[1],
            )
        return moved(self.norm(x), OUTER_RESIDUAL, OUTER_TOKENS, self.policy.mesh), cache

    def head(self) -> tuple[jax.Array, bool]:
        """The output matrix, and whether it is [V, D] (a tied table) instead of [D, V]."""
        if self.lm_head is None:
            return self.embed.table.get_value(), True
        return self.lm_head.kernel.get_value(), False

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        weight, transposed = self.head()
        weight = weight.astype(hidden.dtype)
        return ops.dot(hidden, weight.T if transposed else weight, jnp.float32)

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
