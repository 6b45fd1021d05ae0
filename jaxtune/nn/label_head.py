"""Heads for labels: hidden states in, float32 logits of every token out.

A head trains with every method, whole and in float32, so its layers have no slot; only a pooler,
which belongs to the pretrained model, is a `Linear` like those of the layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxtune import ops
from jaxtune.nn.linear import Linear
from jaxtune.nn.mlp import ACTIVATIONS
from jaxtune.nn.params import HeadParam, Policy
from jaxtune.sharding.rules import gathered

# Between the layers of a head.
_BETWEEN: Mapping[str, Callable[[jax.Array], jax.Array]] = {**ACTIVATIONS, "tanh": jnp.tanh}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shapes and switches of a head.

    Attributes:
        width: D, of the hidden states.
        outputs: logits of a token.
        bias: whether the last layer has one.
        pooler, dense: whether there is such a layer [D, D] before it.
        activation: what follows these.
        problem: how logits and labels are compared, for the objective.
    """

    width: int
    outputs: int
    bias: bool
    pooler: bool
    dense: bool
    activation: str
    problem: str


class Dense(nnx.Module):
    """y = x W + b: [..., D_in] -> [..., D_out] without a slot."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, policy: Policy, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.policy = policy
        self.kernel = HeadParam(
            normal(rngs.params(), (d_in, d_out), policy.param_dtype), axes=("embed", "scores")
        )
        self.bias: Any = nnx.data(None)
        if bias:
            self.bias = HeadParam(jnp.zeros((d_out,), policy.param_dtype), axes=(None,))

    def __call__(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        policy = self.policy
        weight = gathered(
            self.kernel.get_value(),
            ("embed", "scores"),
            policy.mesh,
            scatter=policy.sharding_stage > 1,
        )
        y = ops.dot(x, weight.astype(x.dtype), dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(dtype)


class LabelHead(nnx.Module):
    """[B, T, D] -> float32 [B, T, outputs]."""

    def __init__(self, config: HeadConfig, policy: Policy, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.pooler: Any = nnx.data(None)
        self.dense: Any = nnx.data(None)
        if c.pooler:
            self.pooler = Linear(
                c.width, c.width, axes=("embed", "mlp"), bias=True, policy=policy, rngs=rngs
            )
        if c.dense:
            self.dense = Dense(c.width, c.width, bias=True, policy=policy, rngs=rngs)
        self.out = Dense(c.width, c.outputs, bias=c.bias, policy=policy, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        activate = _BETWEEN[self.config.activation]
        if self.pooler is not None:
            x = activate(self.pooler(x))
        if self.dense is not None:
            x = activate(self.dense(x, x.dtype))
        return self.out(x, jnp.float32)
