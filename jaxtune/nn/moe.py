"""Mixtures of experts: a router chooses a few of many MLPs for every token.

Shazeer et al. 2017 (arXiv 1701.06538); the ways to choose are those of transformers 5.23's Mixtral,
Qwen2-MoE, Qwen3-MoE, gpt-oss, DeepSeek-V2 and DeepSeek-V3.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.nn.experts import Experts
from jaxtune.nn.linear import Linear
from jaxtune.nn.mlp import MLP, ClampedGate, Gate
from jaxtune.nn.params import LoadParam, Policy
from jaxtune.sharding.rules import gathered


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Shapes and switches of a mixture.

    Attributes:
        num_experts: E, of which each token goes to `top_k`.
        expert_size: width of an expert.
        scores: "softmax" over all experts, or "sigmoid" of each expert's logit.
        renormalize: whether the scores of a token's experts are divided by their sum. (A softmax of
            only their logits, as in gpt-oss, is the same.)
        scale: factor of the scores.
        correction: whether experts are chosen by score + a number of each expert's, which balances
            them (DeepSeek-V3, arXiv 2412.19437).
        groups, kept_groups: experts come in so many groups, of which a token chooses a few first.
        best_of_group: a group is as good as the sum of so many of its scores.
        shared_size: width of an MLP that all tokens go through; 0: there is none.
        shared_gate: whether its output is multiplied with the sigmoid of one more output.
        bias: whether the router and the experts' projections have biases.
        clamped: the gate of the experts, if it is another than that of the model's MLPs.
    """

    num_experts: int
    top_k: int
    expert_size: int
    scores: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    kept_groups: int = 1
    best_of_group: int = 1
    shared_size: int = 0
    shared_gate: bool = False
    bias: bool = False
    clamped: ClampedGate | None = None

    @property
    def hidden_size(self) -> int:
        """Width of all MLPs that a token goes through."""
        return self.top_k * self.expert_size + self.shared_size


class Router(nnx.Module):
    """Chooses each token's experts, in float32 whatever the model's dtype."""

    def __init__(self, width: int, config: MoEConfig, *, policy: Policy, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.policy = policy
        normal = nnx.initializers.normal(0.02)
        values = normal(rngs.params(), (width, c.num_experts), policy.param_dtype)
        self.weight = nnx.Param(values, axes=("embed", "scores"))
        self.bias: Any = nnx.data(None)
        if c.bias:
            self.bias = nnx.Param(jnp.zeros((c.num_experts,), policy.param_dtype), axes=(None,))
        self.correction: Any = nnx.data(None)
        if c.correction:
            self.correction = LoadParam(jnp.zeros((c.num_experts,), jnp.float32), axes=(None,))

    def scores(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, E] of x [B, T, D]."""
        c = self.config
        weight = gathered(
            self.weight.get_value(),
            ("embed", "scores"),
            self.policy.mesh,
            scatter=self.policy.sharding_stage > 1,
        )
        logits = jnp.einsum(
            "btd,de->bte",
            x.astype(jnp.float32),
            weight.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.bias is not None:
            logits += self.bias.get_value().astype(jnp.float32)
        return jax.nn.softmax(logits) if c.scores == "softmax" else jax.nn.sigmoid(logits)

    def choose(self, scores: jax.Array) -> jax.Array:
        """Each token's experts, int32 [B, T, k]."""
        c = self.config
        wanted = scores if self.correction is None else scores + self.correction.get_value()
        if c.groups > 1:
            wanted = _in_best_groups(wanted, c)
        return jax.lax.top_k(jax.lax.stop_gradient(wanted), c.top_k)[1]

    def __call__(
        self, x: jax.Array, segments: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Chooses the experts of every token.

        Args:
            x: [B, T, D].
            segments: int32 [B, T], 0 where there is no token; None: each row is full.

        Returns:
            Experts, int32 [B, T, k], and their weights, float32 [B, T, k].
        """
        c = self.config
        scores = self.scores(x)
        chosen = self.choose(scores)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if c.renormalize:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
        if self.policy.counts_loads and self.correction is not None:
            is_token = jnp.ones(x.shape[:2]) if segments is None else (segments > 0) * 1.0
            weights = _counted(weights, self.correction.get_value(), chosen, is_token)
        return chosen, weights * c.scale


@jax.custom_vjp
def _counted(
    weights: jax.Array, correction: jax.Array, chosen: jax.Array, is_token: jax.Array
) -> jax.Array:
    """`weights`; the gradient of `correction` is each expert's number of tokens.

    So it is summed over shards and micro-batches and stacked over layers like a gradient, and exact
    up to 2^24 tokens. `optim.balance` makes a step of it.

    Args:
        weights: float32 [B, T, k].
        correction: float32 [E].
        chosen: int32 [B, T, k].
        is_token: float32 [B, T], 0 for padding.
    """
    del correction, chosen, is_token
    return weights


def _counted_backward(saved: tuple, g: jax.Array) -> tuple:
    correction, chosen, is_token = saved
    of_token = jax.nn.one_hot(chosen, correction.shape[0]).sum(axis=2)
    return g, (of_token * is_token[..., None]).sum(axis=(0, 1)), None, None


_counted.defvjp(lambda weights, *saved: (weights, saved), _counted_backward)


def _in_best_groups(wanted: jax.Array, config: MoEConfig) -> jax.Array:
    """Scores [..., E], those of groups that are not among the best as low as can be."""
    c = config
    grouped = wanted.reshape(*wanted.shape[:-1], c.groups, -1)
    best = jax.lax.top_k(grouped, c.best_of_group)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(best, c.kept_groups)
    is_kept = (kept[..., None] == jnp.arange(c.groups)).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(wanted.shape)


class MoE(nnx.Module):
    """The weighted sum of a token's experts, plus the shared one: [B, T, D] -> [B, T, D]."""

    def __init__(
        self, width: int, config: MoEConfig, *, activation: str, policy: Policy, rngs: nnx.Rngs
    ):
        c = config
        self.router = Router(width, c, policy=policy, rngs=rngs)
        self.experts = Experts(
            c.num_experts,
            width,
            c.expert_size,
            gate=c.clamped or Gate(activation),
            bias=c.bias,
            policy=policy,
            rngs=rngs,
        )
        self.shared_expert: Any = nnx.data(None)
        self.shared_expert_gate: Any = nnx.data(None)
        if c.shared_size:
            self.shared_expert = MLP(
                width, c.shared_size, activation=activation, bias=False, policy=policy, rngs=rngs
            )
        if c.shared_gate:
            self.shared_expert_gate = Linear(
                width, 1, axes=("embed", "gate"), policy=policy, rngs=rngs
            )

    def __call__(self, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        y = self.experts(x, *self.router(x, segments))
        if self.shared_expert is None:
            return y
        shared = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = jax.nn.sigmoid(self.shared_expert_gate(x)) * shared
        return y + shared

    def imbalance(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        """How unevenly the tokens of an example choose: E sum_e f_e P_e, which is k at best.

        f_e is how often expert e is chosen per token of the example, P_e the mean of its scores,
        which sum to 1: the loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, eq. 4),
        scaled as transformers' `load_balancing_loss_func`, of each example by itself as in
        DeepSeek-V3 (arXiv 2412.19437, eq. 17), so that it does not depend on what else is in the
        batch.

        Args:
            x: [B, T, D], what the mixture is given.
            segments: int32 [B, T], the example of each token; None: each row is one.

        Returns:
            float32 [B, T], of each token's example.
        """
        scores = self.router.scores(x)
        num_experts = scores.shape[-1]
        chosen = jax.nn.one_hot(self.router.choose(scores), num_experts).sum(axis=-2)
        shares = scores / scores.sum(axis=-1, keepdims=True)
        if segments is None:
            segments = jnp.zeros(x.shape[:2], jnp.int32)

        def of_row(chosen: jax.Array, shares: jax.Array, segments: jax.Array) -> jax.Array:
            def summed(numbers: jax.Array) -> jax.Array:
                return jax.ops.segment_sum(numbers, segments, len(segments) + 1)

            tokens = jnp.maximum(summed(jnp.ones_like(segments)), 1)
            found = num_experts * (summed(chosen) * summed(shares)).sum(axis=-1) / tokens**2
            return found[segments]

        return jax.vmap(of_row)(chosen, shares, segments)
