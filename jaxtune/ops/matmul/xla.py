"""Products written in jax.numpy: XLA decodes a quantized weight and multiplies with the result."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune.quant import QArray, dequantize

Pair = tuple[jax.Array, jax.Array]


def dot(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[..., D] x [D, F] -> [..., F], summed in float32 and returned in `dtype`."""
    return jnp.einsum("...d,df->...f", x, w, preferred_element_type=jnp.float32).astype(dtype)


def dense(w: jax.Array | QArray, dtype: DTypeLike) -> jax.Array:
    """The weight [D, F] itself."""
    return dequantize(w, dtype) if isinstance(w, QArray) else w.astype(dtype)


def forward(x: jax.Array, w: jax.Array | QArray, low: Pair | None) -> jax.Array:
    """x [..., D] W + u v: [..., F] in x's dtype, for low = (u [..., R], v [R, F])."""
    return _sum(x, dense(w, x.dtype), low)


def transposed(g: jax.Array, w: jax.Array | QArray, low: Pair | None) -> jax.Array:
    """g [..., F] W^T + u v: [..., D] in g's dtype, for low = (u [..., R], v [R, D])."""
    if isinstance(w, QArray):
        # Decoding waits for g. Else XLA would find that the forward pass has decoded the same
        # weight, and keep it until now.
        w, g = jax.lax.optimization_barrier((w, g))
    return _sum(g, dense(w, g.dtype).T, low)


def _sum(x: jax.Array, w: jax.Array, low: Pair | None) -> jax.Array:
    if low is None:
        return dot(x, w, x.dtype)
    return (dot(x, w, jnp.float32) + dot(*low, jnp.float32)).astype(x.dtype)
