"""Products of rows in groups, each group with a matrix of its own: the experts of a mixture.

The gradients are written by hand for the reasons that `ops.matmul` has: frozen experts get none,
quantized ones are saved in codes and decoded again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.lax import RaggedDotDimensionNumbers

from jaxtune.ops.matmul import xla
from jaxtune.ops.matmul.primals import Weight, materialize, unwrap
from jaxtune.quant import QArray

# Rows times W, rows times W^T, and the sum of x^T g over the rows of each group.
_FORWARD, _TRANSPOSED, _OUTER = (
    RaggedDotDimensionNumbers((contracted, ([], [])), [0], groups)
    for contracted, groups in ((([1], [1]), [0]), (([1], [2]), [0]), (([0], [0]), []))
)


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: Weight, sizes: jax.Array) -> jax.Array:
    """Row by row x [M, D] times the matrix of the row's group, in x's dtype: [M, F].

    What comes out for rows behind the last group is not defined.

    Args:
        x: [M, D], float32 or bfloat16, the rows of a group side by side.
        w: [E, D, F], an array or quantized.
        sizes: int32 [E], rows of each group; their sum is M or less.

    Raises:
        NotImplementedError: the gradient of a quantized weight is asked for.
    """
    return _dot(x, xla.dense(w, x.dtype), sizes, _FORWARD).astype(x.dtype)


def _forward(x: CustomVJPPrimal, w: Any, sizes: CustomVJPPrimal) -> tuple:
    values, learns = unwrap(w)
    if learns and isinstance(values, QArray):
        raise NotImplementedError("a quantized weight has no gradient")
    saved = x.value if learns else None
    return grouped_matmul(x.value, values, sizes.value), (saved, values, sizes.value)


def _backward(saved: tuple, cotangent: jax.Array | SymbolicZero) -> tuple:
    x, w, sizes = saved
    g = materialize(cotangent)
    if isinstance(w, QArray):
        # Decoding waits for g, as in `xla.transposed`.
        w, g = jax.lax.optimization_barrier((w, g))
    dx = _dot(g, xla.dense(w, g.dtype), sizes, _TRANSPOSED).astype(g.dtype)
    dw = None if x is None else _dot(x, g, sizes, _OUTER).astype(w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(
    x: jax.Array, w: jax.Array, sizes: jax.Array, numbers: RaggedDotDimensionNumbers
) -> jax.Array:
    return jax.lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=jnp.float32)
