"""Products of rows in groups, each group with a matrix of its own: the experts of a mixture.

The gradients are written by hand for the reasons that `ops.matmul` has: frozen experts get none,
quantized ones are saved in codes and decoded again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike

from jaxtune.ops.matmul import xla
from jaxtune.ops.matmul.primals import Weight, materialize, unwrap
from jaxtune.quant import QArray

# Rows times W, rows times W^T, and the sum of x^T g over the rows of each group.
_FORWARD, _TRANSPOSED, _OUTER = (
    RaggedDotDimensionNumbers((contracted, ([], [])), [0], groups)
    for contracted, groups in ((([1], [1]), [0]), (([1], [2]), [0]), (([0], [0]), []))
)


def grouped_matmul(
    x: jax.Array, w: Weight, sizes: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """Row by row x [M, D] times the matrix of the row's group, in x's dtype: [M, F].

    What comes out for rows behind the last group is not defined.

    Args:
        x: [M, D], float32 or bfloat16, the rows of a group side by side.
        w: [E, D, F], an array or quantized.
        sizes: int32 [E], rows of each group; their sum is M or less.
        implementation: of the weight's gradient, "xla" or "pallas_tpu".

    Raises:
        NotImplementedError: the gradient of a quantized weight is asked for.
    """
    return _product(implementation, x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation: str, x: jax.Array, w: Weight, sizes: jax.Array) -> jax.Array:
    return _dot(x, xla.dense(w, x.dtype), sizes, _FORWARD).astype(x.dtype)


def _forward(implementation: str, x: CustomVJPPrimal, w: Any, sizes: CustomVJPPrimal) -> tuple:
    values, learns = unwrap(w)
    if learns and isinstance(values, QArray):
        raise NotImplementedError("a quantized weight has no gradient")
    saved = x.value if learns else None
    y = _product(implementation, x.value, values, sizes.value)
    return y, (saved, values, sizes.value)


def _backward(implementation: str, saved: tuple, cotangent: jax.Array | SymbolicZero) -> tuple:
    x, w, sizes = saved
    g = materialize(cotangent)
    if isinstance(w, QArray):
        # Decoding waits for g, as in `xla.transposed`.
        w, g = jax.lax.optimization_barrier((w, g))
    dx = _dot(g, xla.dense(w, g.dtype), sizes, _TRANSPOSED).astype(g.dtype)
    return dx, None if x is None else _outer(implementation, x, g, sizes, w.dtype), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _outer(
    implementation: str, x: jax.Array, g: jax.Array, sizes: jax.Array, dtype: DTypeLike
) -> jax.Array:
    if implementation == "pallas_tpu":
        from jaxtune.ops.matmul import grouped_tpu

        return grouped_tpu.outer(x, g, sizes, dtype)
    return _dot(x, g, sizes, _OUTER).astype(dtype)


def _dot(
    x: jax.Array, w: jax.Array, sizes: jax.Array, numbers: RaggedDotDimensionNumbers
) -> jax.Array:
    return jax.lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=jnp.float32)
