"""A frozen matrix kept as small integers and scales.

`QArray` is a pytree, so a quantized kernel is scanned, sharded, donated and saved like an array.
Nothing here knows a format's rounding: that is one file per family of formats.

Layout. A kernel is [D, F] (D is contracted). Groups of consecutive rows of one column share a
scale, which is what bitsandbytes' blocks are for the transposed weight [F, D] of Hugging Face.
Four-bit codes are packed in pairs so that a block of 64 rows stays one tile of 32 rows of bytes:
byte 32 g + i holds row 64 g + i in its low half and row 64 g + 32 + i in its high half. Unpacking
then moves whole tiles, and either axis can be cut at any multiple of 64 rows.
"""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

PACK_ROWS = 64
NESTED_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NestedScale:
    """Scales that are quantized themselves (double quantization, QLoRA, arXiv 2305.14314).

    As in bitsandbytes: scale = dynamic_map[codes] * absmax[block] + offset, where blocks of 256 run
    over the scales of the weight's Hugging Face layout, [F, G] row by row.

    Attributes:
        codes: uint8 [..., G, F].
        absmax: float32 [..., ceil(F G / 256)].
        offset: float32 [...].
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QArray:
    """A quantized kernel [..., D, F]; leading axes are stacks of layers.

    Attributes:
        codes: 8-bit formats: int8 [..., D, F]; 4-bit formats: uint8 [..., D / 2, F], packed.
        scale: [..., G, F] float32, or nested; G groups of D / G rows (G = 1: one per column).
        zero: float32 [..., G, F], the code that means 0, for asymmetric integers; else None.
        order: int32 [..., D], the row of the kernel that each row of codes stands for, for files
            that sort their rows (GPTQ's act-order); else None.
        format: "int8", "int4", "nf4" or "fp4": how a code becomes a number.
    """

    codes: jax.Array
    scale: jax.Array | NestedScale
    zero: jax.Array | None = None
    order: jax.Array | None = None
    format: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.format != "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        *stack, rows, columns = self.codes.shape
        return (*stack, rows * (2 if self.packed else 1), columns)

    @property
    def group_rows(self) -> int:
        """Rows that share a scale."""
        scale = self.scale.codes if isinstance(self.scale, NestedScale) else self.scale
        return self.shape[-2] // scale.shape[-2]


def pack(codes: jax.Array) -> jax.Array:
    """Codes 0..15, uint8 [..., D, F] with D a multiple of 64 -> uint8 [..., D / 2, F]."""
    *stack, rows, columns = codes.shape
    halves = codes.reshape(*stack, rows // PACK_ROWS, 2, PACK_ROWS // 2, columns)
    packed = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return packed.reshape(*stack, rows // 2, columns)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack`: uint8 [..., D / 2, F] -> codes uint8 [..., D, F]."""
    *stack, rows, columns = packed.shape
    tiles = packed.reshape(*stack, rows * 2 // PACK_ROWS, 1, PACK_ROWS // 2, columns)
    # Elementwise, so that it fuses: XLA for CPU writes a concatenation of halves to memory.
    shift = np.array([0, 4], np.uint8).reshape(2, 1, 1)
    return ((tiles >> shift) & 15).reshape(*stack, rows * 2, columns)
