"""Feed-forward layers: gated (Shazeer 2020, arXiv 2002.05202) and plain."""

import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jaxtune import ops
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy

# Names of `hidden_act` in Hugging Face configs.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


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
        self.activation = activation
        self.gate_proj = make(width, hidden, axes=("embed", "mlp"))
        self.up_proj = make(width, hidden, axes=("embed", "mlp"))
        self.down_proj = make(hidden, width, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(ops.swiglu(gate, up))
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


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
