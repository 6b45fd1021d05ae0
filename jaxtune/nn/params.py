"""Kinds of variables, and the policy by which layers are computed.

Every parameter names its trailing axes (`axes=("embed", "mlp")`); axes before those are stacks of
layers. Sharding, adapters and the weight table follow from these names.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class AdapterParam(nnx.Param):
    """A trainable parameter that an adapter adds to the model."""


class AdapterConstant(nnx.Variable):
    """A number that belongs to an adapter and is not trained (its scale)."""


class SeedKey(nnx.Variable):
    """A random key put into a slot for one forward pass; without it there is no noise."""


@dataclass(frozen=True)
class Policy:
    """How a model is computed, apart from what it computes.

    Attributes:
        param_dtype: dtype of the parameters that the constructor makes.
        compute_dtype: dtype of activations and matmul operands.
        softmax_dtype: dtype of attention probabilities.
        attention: implementation of attention, a name of `ops.attention.IMPLEMENTATIONS`.
        layers: "scan" (stacked) or "unroll" (one stack per layer).
        remat: what the backward pass recomputes: "none", "attention", "dots" or "full".
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.float32
    softmax_dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    layers: str = "scan"
    remat: str = "none"
