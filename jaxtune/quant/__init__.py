"""Frozen weights in few bits.

    q = quantize(kernel, "nf4", double_quant=True)
    dequantize(q, jnp.bfloat16)

Both work under jit, vmap and eval_shape, so that shapes are known before there is an array.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant import codebook, int4, int8, nested
from jaxtune.quant.qarray import PACK_ROWS, NestedScale, QArray, pack, unpack

__all__ = [
    "FORMATS", "NestedScale", "QArray", "decode_scale", "dequantize", "pack", "plain_scales",
    "quantize", "quantize_like", "take_columns", "unpack",
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

    Only elementwise operations and reshapes; but sorted rows (`q.order`) are put back by a scatter.
    """
    *stack, rows, columns = q.shape
    tiled = q.packed or q.group_rows < rows
    codes = unpack(q.codes) if q.packed else q.codes
    if tiled:
        codes = codes.reshape(*stack, *_tiles(q), columns)
    if tiled and not q.packed:
        codes = jax.lax.optimization_barrier(codes)
    kernel = _VALUES[q.format](codes)
    if q.zero is not None:
        middle = int4.MIDDLE if q.format == "int4" else 0
        kernel = kernel - _spread(q.zero - middle, q)
    kernel = (kernel * _spread(decode_scale(q.scale, q.shape), q)).astype(dtype)
    if tiled:
        # XLA for TPU would move reshapes on to the scales and write them out as large as the
        # kernel: by its estimate 4096 x 14336 took 4.7 ms and 224 MiB on a v5e, not 1.3 and none.
        kernel = jax.lax.optimization_barrier(kernel).reshape(*stack, rows, columns)
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


def plain_scales(w: jax.Array | QArray) -> jax.Array | QArray:
    """A weight that may be cut: nested scales, which are numbered over all of it, are decoded."""
    if isinstance(w, QArray):
        return dataclasses.replace(w, scale=decode_scale(w.scale, w.shape))
    return w


def _tiles(q: QArray) -> tuple[int, int, int]:
    """How rows are cut so that a scale goes with whole tiles: (D / 64, 2, 32) or (G, 1, D / G)."""
    rows = q.shape[-2]
    if rows % PACK_ROWS:
        return rows // q.group_rows, 1, q.group_rows
    return rows // PACK_ROWS, 2, PACK_ROWS // 2


def _spread(groups: jax.Array, q: QArray) -> jax.Array:
    """One number for each group of rows, [..., G, F], as it broadcasts against the codes."""
    *stack, _, columns = groups.shape
    if q.group_rows == q.shape[-2]:
        return groups[..., None, None, :] if q.packed else groups
    count, *tile = _tiles(q)
    each, rest = divmod(q.group_rows, math.prod(tile))
    if not rest:
        return jnp.repeat(groups, each, axis=-2)[..., None, None, :]
    return jnp.repeat(groups, q.group_rows, axis=-2).reshape(*stack, count, *tile, columns)


def _sort_rows(kernel: jax.Array, order: jax.Array) -> jax.Array:
    """Row i of a kernel [..., D, F] becomes row order[i]."""

    def sort(kernel: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.zeros_like(kernel).at[order].set(kernel, unique_indices=True)

    for _ in order.shape[:-1]:
        sort = jax.vmap(sort)
    return sort(kernel, order)


def take_columns(kernel: QArray, columns: np.ndarray | None) -> QArray:
    """Some columns of a kernel; nested scales, which are numbered over all, become plain ones."""
    if columns is None:
        return kernel
    scale = kernel.scale
    if isinstance(scale, NestedScale):
        scale = decode_scale(scale, kernel.shape)
    return dataclasses.replace(
        kernel,
        codes=kernel.codes[..., columns],
        scale=scale[..., columns],
        zero=None if kernel.zero is None else kernel.zero[..., columns],
    )
