"""Rotation of query and key heads, Hugging Face's half-split layout."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + half_rotated(x) sin, where half_rotated([a, b]) = [-b, a].

    Args:
        x: [B, T, N, H].
        cos, sin: float32 [B, T, 1, R], each half repeated; they get no gradient. Of a head, the
            first R numbers are rotated (GPT-NeoX's partial rotation, if R < H).

    Returns:
        [B, T, N, H] in x's dtype, computed in float32.
    """
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return _rotate(x, cos, sin)
    return jnp.concatenate([_rotate(x[..., :size], cos, sin), x[..., size:]], axis=-1)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * cos + _half_rotated(x32) * sin).astype(x.dtype)


def _half_rotated(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


def _forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple:
    return _rotate(x, cos, sin), (cos, sin)


def _backward(saved: tuple, g: jax.Array) -> tuple:
    cos, sin = saved
    g32 = g.astype(jnp.float32)
    return (g32 * cos - _half_rotated(g32 * sin)).astype(g.dtype), None, None


_rotate.defvjp(_forward, _backward)
