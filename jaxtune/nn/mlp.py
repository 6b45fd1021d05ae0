"""Feed-forward layers: gated (Shazeer 2020, arXiv 2002.05202) and plain."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy
from jaxtune.quant import QArray

# Names of `hidden_act` in Hugging Face configs.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Gate:
    """act(gate) * up, with an activation of `ACTIVATIONS`."""

    activation: str

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.activation == "silu":
            return ops.swiglu(gate, up)
        return ACTIVATIONS[self.activation](gate) * up


@dataclass(frozen=True)
class ClampedGate:
    """gate sigmoid(alpha gate) (up + 1), where both are clamped before (gpt-oss)."""

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(gate * self.alpha) * (up + 1)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)): [..., D] -> [..., D] through width F."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        bias: bool,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(Linear, bias=bias, policy=policy, rngs=rngs)
        self.gate = Gate(activation)
        self.gate_proj = make(width, hidden, axes=("embed", "mlp"))
        self.up_proj = make(width, hidden, axes=("embed", "mlp"))
        self.down_proj = make(hidden, width, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if isinstance(self.up_proj.kernel.get_value(), QArray):
            return self.down_proj(self.gate(gate, up))
        return self.down_proj(_with_settled_gradient(self.gate(_settled(gate), _settled(up))))


def _barrier(x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def _settled(x: jax.Array) -> jax.Array:
    """x, which XLA for TPU computes before what follows.

    Else it makes the gate, and the gate's gradient, the end of a dense product, which that slows
    down: tiles of more operands and results leave less room for the product's own.
    """
    return _barrier(x)


_settled.defvjp(lambda x: (_barrier(x), None), lambda _, g: (g,))


@jax.custom_vjp
def _with_settled_gradient(x: jax.Array) -> jax.Array:
    """x, whose gradient XLA for TPU computes before what follows."""
    return x


_with_settled_gradient.defvjp(lambda x: (x, None), lambda _, g: (_barrier(g),))


class PlainMLP(nnx.Module):
    """down(act(up(x))): [..., D] -> [..., D] through width F."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        bias: bool,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(Linear, bias=bias, policy=policy, rngs=rngs)
        self.activation = activation
        self.up_proj = make(width, hidden, axes=("embed", "mlp"))
        self.down_proj = make(hidden, width, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
