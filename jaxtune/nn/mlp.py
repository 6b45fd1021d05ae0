"""The gated feed-forward layer (Shazeer 2020, arXiv 2002.05202): down(act(gate(x)) * up(x))."""

import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jaxtune import ops
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy

# Names of `hidden_act` in Hugging Face configs.
GATES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": ops.swiglu,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_pytorch_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "relu": lambda gate, up: jax.nn.relu(gate) * up,
}


class MLP(nnx.Module):
    """[..., D] -> [..., D] through width F."""

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
        self.gate = GATES[activation]
        self.gate_proj = make(width, hidden, axes=("embed", "mlp"))
        self.up_proj = make(width, hidden, axes=("embed", "mlp"))
        self.down_proj = make(hidden, width, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x)))
