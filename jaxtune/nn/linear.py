"""A linear layer with a slot for an adapter.

The slot holds None or a module that is called with the input and the layer itself, and returns the
layer's whole output. Kernels are [D_in, D_out]; layers of a stack have a leading axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import ops
from jaxtune.nn.params import Policy


class Linear(nnx.Module):
    """y = x W + b, or what the adapter in the slot makes of it."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str, str],
        policy: Policy,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        normal = nnx.initializers.normal(0.02)
        self.axes = axes
        self.kernel = nnx.Param(normal(rngs.params(), (d_in, d_out), policy.param_dtype), axes=axes)
        self.bias: Any = nnx.data(None)
        if bias:
            zeros = jnp.zeros((d_out,), policy.param_dtype)
            self.bias = nnx.Param(zeros, axes=(axes[1],))
        self.adapter: Any = nnx.data(None)

    def project(self, x: jax.Array) -> jax.Array:
        """The layer without its adapter: [..., D_in] -> [..., D_out]."""
        return self.add_bias(ops.matmul(x, self.kernel.get_value()))

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias, if the layer has one."""
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.project(x) if self.adapter is None else self.adapter(x, self)
        return checkpoint_name(y, "linear")
