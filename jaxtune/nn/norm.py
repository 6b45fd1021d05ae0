"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

Computed in float32 whatever the activations' dtype; as in transformers' LlamaRMSNorm the scale
multiplies the normalised value.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.params import Policy


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis."""

    def __init__(self, width: int, eps: float, *, policy: Policy):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), policy.param_dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.rms_norm(x, self.scale.get_value(), self.eps)
