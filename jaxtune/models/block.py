"""The layers of decoders: attention and MLP, one after the other or side by side.

On a mesh the residual and its norms are cut along the tokens over the tensor axis too, which would
compute them as often as it has shards (Korthikanti et al. 2022, arXiv 2205.05198).
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxtune.nn.attention import Attention, AttentionConfig, Segments
from jaxtune.nn.cache import Past
from jaxtune.nn.latent import LatentAttention
from jaxtune.nn.mlp import MLP, PlainMLP
from jaxtune.nn.moe import MoE, MoEConfig
from jaxtune.nn.norm import NORMS
from jaxtune.nn.params import Policy
from jaxtune.nn.rope import Rope
from jaxtune.sharding.rules import RESIDUAL, TOKENS, moved


@dataclass(frozen=True)
class LayerKind:
    """What the layers of a model may differ in, apart from their weights.

    Attributes:
        rope: how heads are rotated; None: not at all.
        window: how far back a token sees (see `ops.attention.Mask`); None: to the first.
        dense: the layer has an MLP where others have a mixture of experts.
        crosses: the layer also attends to what an encoder made of another text.
    """

    rope: Rope | None = None
    window: int | None = None
    dense: bool = False
    crosses: bool = False

    @property
    def form(self) -> tuple[bool, bool]:
        """Equal for layers that have the same parameters."""
        return self.dense, self.crosses


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model of a family's config reads a source and writes a target."""
    return any(kind.crosses for kind in config.layer_kinds)


@dataclass(frozen=True, kw_only=True)
class BlockConfig(AttentionConfig):
    """Shapes and switches of a layer.

    Attributes:
        norms: which norms there are: of the inputs of attention and MLP (`attn_norm`, `mlp_norm`)
            and of their outputs (`attn_post_norm`, `mlp_post_norm`).
        gated: whether the MLP has a gate.
        mlp_bias: whether its projections have biases.
        activation: name in `mlp.ACTIVATIONS`.
        moe: a mixture of experts in place of the MLP; None: there is none.
    """

    intermediate_size: int
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    gated: bool = True
    mlp_bias: bool = False
    activation: str = "silu"
    moe: MoEConfig | None = None

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0: there are none."""
        return self.moe.num_experts if self.moe else 0


def _norm(name: str, config: BlockConfig, policy: Policy) -> Any:
    if name not in config.norms:
        return unchanged
    return NORMS[config.norm](config.hidden_size, config.norm_eps, policy=policy)


def unchanged(x: jax.Array) -> jax.Array:
    """x: stands where a model has no norm."""
    return x


def mlp_of(config: BlockConfig, policy: Policy, rngs: nnx.Rngs) -> nnx.Module:
    """The MLP of a layer, or the mixture in its place."""
    if config.moe is not None:
        return MoE(
            config.hidden_size, config.moe, activation=config.activation, policy=policy, rngs=rngs
        )
    return (MLP if config.gated else PlainMLP)(
        config.hidden_size,
        config.intermediate_size,
        activation=config.activation,
        bias=config.mlp_bias,
        policy=policy,
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); what is added may be normalised too."""

    def __init__(self, config: BlockConfig, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        self.attn_norm = _norm("attn_norm", config, policy)
        attention = Attention if config.latent is None else LatentAttention
        self.attn = attention(config, policy=policy, rngs=rngs)
        self.attn_post_norm = _norm("attn_post_norm", config, policy)
        self.mlp_norm = _norm("mlp_norm", config, policy)
        self.mlp = mlp_of(config, policy, rngs)
        self.mlp_post_norm = _norm("mlp_post_norm", config, policy)

    def __call__(
        self, x: jax.Array, rope: Any, segments: Segments, past: Past, **options: Any
    ) -> tuple[jax.Array, Any]:
        """The output and the new cache, or without one the imbalance of experts if it is wanted.

        Arguments are those of `Attention`.
        """
        mesh = self.policy.mesh
        normed = moved(self.attn_norm(x), RESIDUAL, TOKENS, mesh)
        y, new = self.attn(normed, rope, segments, past, **options)
        x = x + self.attn_post_norm(moved(y, TOKENS, RESIDUAL, mesh))
        normed = moved(self.mlp_norm(x), RESIDUAL, TOKENS, mesh)
        given: tuple[Any, ...] = (normed,)
        if isinstance(self.mlp, MoE):
            given = (normed, segments.queries)
            if self.policy.imbalance and past.cache is None:
                new = self.mlp.imbalance(*given)
        return x + self.mlp_post_norm(moved(self.mlp(*given), TOKENS, RESIDUAL, mesh)), new


class ParallelBlock(nnx.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm for both or one for each."""

    def __init__(self, config: BlockConfig, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        self.attn_norm = _norm("attn_norm", config, policy)
        self.attn = Attention(config, policy=policy, rngs=rngs)
        self.is_shared = "mlp_norm" not in config.norms
        self.mlp_norm = _norm("mlp_norm", config, policy)
        self.mlp = mlp_of(config, policy, rngs)

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> tuple[jax.Array, Any]:
        """The output and the new cache; `inputs` and `options` are those of `Attention`."""
        mesh = self.policy.mesh
        normed = moved(self.attn_norm(x), RESIDUAL, TOKENS, mesh)
        y, cache = self.attn(normed, *inputs, **options)
        if not self.is_shared:
            normed = moved(self.mlp_norm(x), RESIDUAL, TOKENS, mesh)
        return x + moved(y + self.mlp(normed), TOKENS, RESIDUAL, mesh), cache
