"""Matrix products with a weight that may be frozen, alone or with a low-rank adapter.

Gradients are written by hand for three reasons: operands stay in the compute dtype while sums are
float32 (XLA for CPU and the matrix units of TPU and GPU have a fast path for just that form, which
autodiff would leave in the backward pass); the gradient of a frozen weight is never computed; and
the products that make an adapter's gradients contract over the last axis of a small left operand (a
left operand contracted over its leading axis has no fast kernel on CPU).
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike


def dot(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[..., D] x [D, F] -> [..., F], summed in float32 and returned in `dtype`."""
    return jnp.einsum("...d,df->...f", x, w, preferred_element_type=jnp.float32).astype(dtype)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, F], computed and returned in x's dtype."""
    return dot(x, w.astype(x.dtype), x.dtype)


def _matmul_forward(x: CustomVJPPrimal, w: CustomVJPPrimal) -> tuple:
    return matmul(x.value, w.value), (x.value if w.perturbed else None, w.value)


def _matmul_backward(saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    x, w = saved
    g = _materialize(g)
    dx = dot(g, w.astype(g.dtype).T, g.dtype)
    return dx, None if x is None else _weight_gradient(x, g).astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


@jax.custom_vjp
def adapted_matmul(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (w + a b), the product of an adapted layer, computed and returned in x's dtype.

    In float32 with many rows the small product a b is added to the weight first, which costs fewer
    operations than two more products with x; otherwise (few rows, or a dtype in which the sum would
    round the adapter away) it is x w + (x a) b.

    Args:
        x: [..., D].
        w: [D, F]; its gradient is not available: the base of an adapter is frozen.
        a: [D, R], any float dtype.
        b: [R, F], scaled already.
    """
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    if _merges(x, w):
        return dot(x, _merged(w, a, b), x.dtype)
    base = dot(x, w.astype(x.dtype), jnp.float32)
    return (base + dot(dot(x, a, x.dtype), b, jnp.float32)).astype(x.dtype)


def _adapted_forward(
    x: CustomVJPPrimal, w: CustomVJPPrimal, a: CustomVJPPrimal, b: CustomVJPPrimal
) -> tuple:
    if w.perturbed:
        raise NotImplementedError("the base weight of an adapted product has no gradient")
    operands = (x.value, w.value, a.value, b.value)
    return adapted_matmul(*operands), operands


def _adapted_backward(saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    x, w, a_master, b_master = saved
    g = _materialize(g)
    a, b = a_master.astype(x.dtype), b_master.astype(x.dtype)
    if _merges(x, w):
        dx = dot(g, _merged(w, a, b).T, g.dtype)
    else:
        base = dot(g, w.astype(g.dtype).T, jnp.float32)
        dx = (base + dot(dot(g, b.T, g.dtype), a.T, jnp.float32)).astype(g.dtype)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    gb = jnp.einsum("rf,mf->rm", b, g, preferred_element_type=jnp.float32).astype(g.dtype)
    # The barriers keep XLA from folding the small transposes into the products, which would turn
    # them into the slow form.
    a_transposed = jax.lax.optimization_barrier(a.T)
    xa = jnp.einsum("rd,md->rm", a_transposed, x, preferred_element_type=jnp.float32)
    xa = xa.astype(x.dtype)
    da = jnp.einsum("rm,md->rd", gb, x, preferred_element_type=jnp.float32)
    da = jax.lax.optimization_barrier(da).T
    db = jnp.einsum("rm,mf->rf", xa, g, preferred_element_type=jnp.float32)
    return dx, None, da.astype(a_master.dtype), db.astype(b_master.dtype)


adapted_matmul.defvjp(_adapted_forward, _adapted_backward, symbolic_zeros=True)


def _merges(x: jax.Array, w: jax.Array) -> bool:
    rows = x.size // x.shape[-1]
    d, f = w.shape
    return x.dtype == jnp.float32 and rows * (d + f) > d * f


def _merged(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return w.astype(a.dtype) + a @ b


def _weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.einsum("md,mf->df", x, g, preferred_element_type=jnp.float32)


def _materialize(g: jax.Array | SymbolicZero) -> jax.Array:
    return jnp.zeros(g.aval.shape, g.aval.dtype) if isinstance(g, SymbolicZero) else g  # pyright: ignore[reportAttributeAccessIssue]
