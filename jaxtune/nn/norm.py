"""Normalisation layers, computed in float32 whatever the activations' dtype."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.params import Policy


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis (arXiv 1910.07467, eq. 4).

    As in transformers' LlamaRMSNorm the scale multiplies the normalised value. With `centered` the
    factor is 1 + scale (transformers' GemmaRMSNorm).
    """

    def __init__(
        self, width: int, eps: float, *, policy: Policy, axis: str = "embed", centered: bool = False
    ):
        start = jnp.zeros if centered else jnp.ones
        self.eps = eps
        self.centered = centered
        self.scale = nnx.Param(start((width,), policy.param_dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale.get_value()
        return ops.rms_norm(x, 1 + scale.astype(jnp.float32) if self.centered else scale, self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, over the last axis (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, *, policy: Policy, axis: str = "embed"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), policy.param_dtype), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((width,), policy.param_dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


# What a model's config calls them.
NORMS = {
    "rms": RMSNorm,
    "centered_rms": functools.partial(RMSNorm, centered=True),
    "layer": LayerNorm,
}
