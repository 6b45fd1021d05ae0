"""Matrix products with a weight that may be frozen or quantized, alone or with a low-rank adapter.

Gradients are written by hand for four reasons: operands stay in the compute dtype while sums are
float32 (XLA for CPU and the matrix units of TPU and GPU have a fast path for just that form, which
autodiff would leave in the backward pass); the gradient of a frozen weight is never computed; a
quantized weight is saved for the backward pass as it is, in codes and scales, and decoded again;
and the products that make an adapter's gradients contract over the last axis of a small left
operand (a left operand contracted over its leading axis has no fast kernel on CPU).

An implementation is a module with two functions: `forward` (x W + u^T v) and `transposed`
(g W^T + u^T v), where u^T v is what an adapter adds. A dense weight is always XLA's.
"""

import dataclasses
import functools
import importlib
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxtune.ops.matmul import xla
from jaxtune.ops.matmul.grouped import grouped_matmul
from jaxtune.ops.matmul.primals import Weight, materialize, unwrap
from jaxtune.ops.matmul.xla import Pair, dot, stay_transposed
from jaxtune.quant import QArray

__all__ = ["IMPLEMENTATIONS", "adapted_matmul", "dot", "grouped_matmul", "matmul"]

# Name -> module of this folder that multiplies with a quantized weight, imported when it is used.
IMPLEMENTATIONS = MappingProxyType({"xla": "xla", "pallas_tpu": "pallas_tpu"})


def matmul(x: jax.Array, w: Weight, *, implementation: str = "xla") -> jax.Array:
    """x [..., D] times w [D, F], computed and returned in x's dtype: [..., F].

    Args:
        x: [..., D], float32 or bfloat16.
        w: [D, F], an array or quantized.
        implementation: of the product with a quantized weight, a key of `IMPLEMENTATIONS`.

    Raises:
        NotImplementedError: the gradient of a quantized weight is asked for, or the implementation
            does not support its layout.
    """
    return _matmul(implementation, x, w)


def adapted_matmul(
    x: jax.Array, w: Weight, a: jax.Array, b: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """x (w + a b), the product of an adapted layer, computed and returned in x's dtype: [..., F].

    In float32 with many rows XLA adds the small product a b to the weight first, which costs fewer
    operations than two more products with x; otherwise (few rows, a dtype in which the sum would
    round the adapter away, or a kernel) it is x w + (x a) b.

    Args:
        x: [..., D], float32 or bfloat16.
        w: [D, F], an array or quantized; its gradient is not available: the base of an adapter is
            frozen.
        a: [D, R], any float dtype.
        b: [R, F], scaled already.
        implementation: as for `matmul`.

    Raises:
        NotImplementedError: the gradient of `w` is asked for, or the implementation does not
            support its layout.
    """
    return _adapted(implementation, x, w, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, w: Weight) -> jax.Array:
    return _forward(implementation, x, w)


def _matmul_forward(implementation: str, x: CustomVJPPrimal, w: Any) -> tuple:
    values, learns = unwrap(w)
    if learns and isinstance(values, QArray):
        raise NotImplementedError("a quantized weight has no gradient")
    saved = x.value if learns else None
    return _matmul(implementation, x.value, values), (saved, values)


def _matmul_backward(implementation: str, saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    x, w = saved
    g = materialize(g)
    dx = _transposed(implementation, g, w)
    return dx, None if x is None else _weight_gradient(x, g).astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(implementation: str, x: jax.Array, w: Weight, a: jax.Array, b: jax.Array) -> jax.Array:
    return _adapted_product(implementation, x, w, a, b)[0]


def _adapted_product(
    implementation: str, x: jax.Array, w: Weight, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The product and x a [R, ...], if that was needed."""
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    if _merges(implementation, x, w):
        return dot(x, xla.dense(w, x.dtype) + a @ b, x.dtype), None
    xa = checkpoint_name(_thin(stay_transposed(a.T), x), "low_rank")
    return _forward(implementation, x, w, (xa, b)), xa


def _adapted_forward(
    implementation: str, x: CustomVJPPrimal, w: Any, a: CustomVJPPrimal, b: CustomVJPPrimal
) -> tuple:
    values, learns = unwrap(w)
    if learns:
        raise NotImplementedError("the base weight of an adapted product has no gradient")
    operands = (x.value, values, a.value, b.value)
    y, xa = _adapted_product(implementation, *operands)
    return y, (*operands, xa)


def _adapted_backward(implementation: str, saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    x, w, a_master, b_master, xa = saved
    g = materialize(g)
    a, b = a_master.astype(x.dtype), b_master.astype(x.dtype)
    gb = _thin(b, g)
    if _merges(implementation, x, w):
        dx = dot(g, (xla.dense(w, x.dtype) + a @ b).T, g.dtype)
    else:
        dx = _transposed(implementation, g, w, (gb, a.T))
    if xa is None:
        xa = _thin(stay_transposed(a.T), x)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    gb, xa = gb.reshape(gb.shape[0], -1), xa.reshape(xa.shape[0], -1)
    da = jnp.einsum("rm,md->rd", gb, x, preferred_element_type=jnp.float32)
    db = jnp.einsum("rm,mf->rf", xa, g, preferred_element_type=jnp.float32)
    return dx, None, stay_transposed(da).T.astype(a_master.dtype), db.astype(b_master.dtype)


_adapted.defvjp(_adapted_forward, _adapted_backward, symbolic_zeros=True)


def _forward(implementation: str, x: jax.Array, w: Weight, low: Pair | None = None) -> jax.Array:
    module = _module(implementation, w)
    if isinstance(w, QArray) and w.order is not None:
        x, w = stay_transposed(x[..., w.order]), dataclasses.replace(w, order=None)
    return module.forward(x, w, low)


def _transposed(implementation: str, g: jax.Array, w: Weight, low: Pair | None = None) -> jax.Array:
    module = _module(implementation, w)
    if not isinstance(w, QArray) or w.order is None:
        return module.transposed(g, w, low)
    rows = jnp.argsort(w.order)
    low = low and (low[0], low[1][:, w.order])
    return module.transposed(g, dataclasses.replace(w, order=None), low)[..., rows]


def _module(implementation: str, w: Weight) -> ModuleType:
    name = IMPLEMENTATIONS[implementation]
    return importlib.import_module(f"{__name__}.{name}") if isinstance(w, QArray) else xla


def _thin(small: jax.Array, x: jax.Array) -> jax.Array:
    """small [R, D], x [..., D] -> [R, ...] in x's dtype: few rows, so that lanes are full."""
    flat = x.reshape(-1, x.shape[-1])
    y = jnp.einsum("rd,md->rm", small, flat, preferred_element_type=jnp.float32).astype(x.dtype)
    return y.reshape(-1, *x.shape[:-1])


def _merges(implementation: str, x: jax.Array, w: Weight) -> bool:
    rows = x.size // x.shape[-1]
    d, f = w.shape
    is_xla = implementation == "xla" or not isinstance(w, QArray)
    return is_xla and x.dtype == jnp.float32 and rows * (d + f) > d * f


def _weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.einsum("md,mf->df", x, g, preferred_element_type=jnp.float32)
