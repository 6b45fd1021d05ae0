"""Normalisation over the last axis with hand-written gradients (they save only the inputs)."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple:
    return rms_norm(x, scale, eps), (x, scale)


def _backward(eps: float, saved: tuple, g: jax.Array) -> tuple:
    x, scale = saved
    y, g = x.astype(jnp.float32), g.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    scaled = g * scale.astype(jnp.float32)
    mean = jnp.mean(scaled * y, axis=-1, keepdims=True)
    dx = inverse * (scaled - y * (inverse * inverse * mean))
    dscale = (g * y * inverse).sum(axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32, returned in x's dtype."""
    normal, _ = _standardized(x, eps)
    return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _standardized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Rows of mean 0 and variance 1, and what they were divided by (inverted), float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y * inverse, inverse


def _layer_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> tuple:
    return layer_norm(x, scale, bias, eps), (x, scale, bias)


def _layer_backward(eps: float, saved: tuple, g: jax.Array) -> tuple:
    x, scale, bias = saved
    g = g.astype(jnp.float32)
    normal, inverse = _standardized(x, eps)
    scaled = g * scale.astype(jnp.float32)
    mean = jnp.mean(scaled, axis=-1, keepdims=True)
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    dscale, dbias = (g * normal).sum(axis=rows), g.sum(axis=rows)
    dx = inverse * (scaled - mean - normal * along)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)
