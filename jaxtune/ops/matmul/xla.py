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
    """x [..., D] W + u^T v: [..., F] in x's dtype, for low = (u [R, ...], v [R, F])."""
    return _sum(x, dense(w, x.dtype), low, can_join=not isinstance(w, QArray))


def transposed(g: jax.Array, w: jax.Array | QArray, low: Pair | None) -> jax.Array:
    """g [..., F] W^T + u^T v: [..., D] in g's dtype, for low = (u [R, ...], v [R, D])."""
    is_dense = not isinstance(w, QArray)
    if not is_dense:
        # Decoding waits for g. Else XLA would find that the forward pass has decoded the same
        # weight, and keep it until now.
        w, g = jax.lax.optimization_barrier((w, g))
    return _sum(g, dense(w, g.dtype).T, low, can_join=is_dense)


def _sum(x: jax.Array, w: jax.Array, low: Pair | None, *, can_join: bool) -> jax.Array:
    if low is None:
        return dot(x, w, x.dtype)
    if can_join and x.dtype != jnp.float32:
        return jax.lax.platform_dependent(x, w, *low, tpu=joined, default=added)
    return added(x, w, *low)


def joined(x: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """[x u^T] [w; v]: one product, into which XLA for TPU reads its operands piece by piece.

    As two products the larger one would be written and read again to add the other.
    """
    wide, tall = [x, jnp.moveaxis(u, 0, -1)], [w, v]
    return dot(jnp.concatenate(wide, -1), jnp.concatenate(tall), x.dtype)


def added(x: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    u = stay_transposed(jnp.moveaxis(u, 0, -1))
    # The small product is rounded first: in float32 XLA for TPU would write a whole [M, F] of it.
    return (dot(x, w, jnp.float32) + dot(u, v, x.dtype)).astype(x.dtype)


def stay_transposed(x: jax.Array) -> jax.Array:
    """Keeps XLA for CPU from folding a transpose into a product, a form it is slow in or refuses.

    On TPU folding is what one wants: da and db of a 4096 x 14336 layer, rank 16 and 2048 rows take
    0.040 estimated ms on a v5e, 0.065 with barriers and 0.089 in autodiff's form.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)
