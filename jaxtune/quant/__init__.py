"""Frozen weights in few bits.

    q = quantize(kernel, "nf4", double_quant=True)
    dequantize(q, jnp.bfloat16)

Both work under jit, vmap and eval_shape, so that shapes are known before there is an array.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.quant import codebook, int4, int8, nested
from jaxtune.quant.qarray import PACK_ROWS, NestedScale, QArray, pack, unpack

__all__ = [
    "FORMATS", "NestedScale", "QArray", "decode_scale", "dequantize", "pack", "quantize",
    "quantize_like", "unpack",
]  # fmt: skip


class Format(NamedTuple):
    """A way to quantize that a user may choose.

    Attributes:
        codes: `QArray.format`, how a code becomes a number.
        encode: (blocks [..., G, rows, F], absmax [..., G, F]) -> codes like blocks, scale.
        per_column: one scale for a whole column, whatever the block size.
        nests: whether its scales may be quantized too.
    """

    codes: str
    encode: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    per_column: bool = False
    nests: bool = False


FORMATS = {
    "int8": Format("int8", int8.encode, per_column=True),
    "int8_block": Format("int8", int8.encode),
    "int4": Format("int4", int4.encode),
    "nf4": Format("nf4", partial(codebook.encode, book="nf4"), nests=True),
    "fp4": Format("fp4", partial(codebook.encode, book="fp4"), nests=True),
}

_VALUES = {
    "int8": int8.values,
    "int4": int4.values,
    "nf4": partial(codebook.values, book="nf4"),
    "fp4": partial(codebook.values, book="fp4"),
}


def quantize(
    kernel: jax.Array, format: str, *, block_size: int = 64, double_quant: bool = False
) -> QArray:
    """Quantizes a kernel [..., D, F], whose leading axes are stacks of layers.

    Args:
        kernel: of any float dtype; the maths is float32.
        format: a key of `FORMATS`. "int8" has the codes of LLM.int8, "nf4" and "fp4" those of
            bitsandbytes for the transposed weight.
        block_size: rows that share a scale; "int8" has one scale per column instead.
        double_quant: quantize the scales of nf4 and fp4 as well.

    Raises:
        ValueError: D is not a multiple of the block size, or of 64 for four bits; or the format
            cannot be double-quantized.
    """
    chosen = FORMATS[format]
    *stack, rows, columns = kernel.shape
    if chosen.per_column:
        block_size = rows
    packed = chosen.codes != "int8"
    unit = math.lcm(block_size, PACK_ROWS) if packed else block_size
    if rows % unit:
        raise ValueError(
            f"a kernel of {rows} input features cannot be quantized to {format} in blocks of "
            f"{block_size}: {rows} is not a multiple of {unit}, and a block never spans two "
            "columns - leave this layer dense or quantize it to int8"
        )
    if double_quant and not chosen.nests:
        raise ValueError(
            f"the scales of {format} cannot be quantized themselves (double quantization): only "
            "those of nf4 and fp4 - turn it off or choose one of these"
        )
    blocks = kernel.astype(jnp.float32).reshape(*stack, rows // block_size, block_size, columns)
    codes, scale = chosen.encode(blocks, jnp.max(jnp.abs(blocks), axis=-2))
    codes = codes.reshape(kernel.shape)
    return QArray(
        pack(codes) if packed else codes,
        nested.encode(scale) if double_quant else scale,
        format=chosen.codes,
    )


def quantize_like(like: QArray, kernel: jax.Array) -> QArray:
    """Quantizes a kernel [..., D, F] as `like` is, whose leaves need only shapes."""
    in_blocks = like.group_rows < like.shape[-2]
    return quantize(
        kernel,
        "int8_block" if like.format == "int8" and in_blocks else like.format,
        block_size=like.group_rows,
        double_quant=isinstance(like.scale, NestedScale),
    )


def dequantize(q: QArray, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The dense kernel [..., D, F], computed in float32.

    Only elementwise operations and reshapes, which fuse with the product that reads the result;
    but sorted rows (`q.order`) are put back by a scatter.
    """
    *stack, rows, columns = q.shape
    codes = unpack(q.codes) if q.packed else q.codes
    blocks = _VALUES[q.format](codes).reshape(*stack, -1, q.group_rows, columns)
    if q.zero is not None:
        middle = int4.MIDDLE if q.format == "int4" else 0
        blocks = blocks - (q.zero - middle)[..., None, :]
    blocks = blocks * decode_scale(q.scale, q.shape)[..., None, :]
    kernel = blocks.astype(dtype).reshape(*stack, rows, columns)
    return kernel if q.order is None else _sort_rows(kernel, q.order)


def decode_scale(scale: jax.Array | NestedScale, shape: Sequence[int]) -> jax.Array:
    """The scales of a kernel of the given shape [..., D, F], float32 [..., G, F].

    Raises:
        ValueError: they are not the scales of such a kernel.
    """
    decoded = nested.decode(scale) if isinstance(scale, NestedScale) else scale
    *stack, groups, columns = decoded.shape
    if (*stack, columns) != (*shape[:-2], shape[-1]) or shape[-2] % groups:
        raise ValueError(f"scales {decoded.shape} do not belong to a kernel {tuple(shape)}")
    return decoded.astype(jnp.float32)


def _sort_rows(kernel: jax.Array, order: jax.Array) -> jax.Array:
    """Row i of a kernel [..., D, F] becomes row order[i]."""

    def sort(kernel: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.zeros_like(kernel).at[order].set(kernel, unique_indices=True)

    for _ in order.shape[:-1]:
        sort = jax.vmap(sort)
    return sort(kernel, order)
