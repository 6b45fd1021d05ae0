"""A quantized weight as files hold it, and the integers that GPTQ and AWQ pack into words."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.quant import QArray
from jaxtune.quant.qarray import PACK_ROWS

# Name of a tensor -> the array.
Read = Callable[[str], np.ndarray]


class Stored(NamedTuple):
    """The tensors that make up a weight, and the kernel [D, F] they become."""

    parts: tuple[str, ...]
    kernel: QArray  # of ShapeDtypeStructs


def integer_kernel(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, order: np.ndarray | None, bits: int
) -> QArray:
    """An asymmetric integer kernel: value = (code - zero) * scale.

    Args:
        codes: 0 .. 2^bits - 1, integers [D, F].
        scale: [G, F].
        zero: codes that mean 0, integers [G, F].
        order: rows of the kernel that the rows of codes stand for, int32 [D]; None: in order.
        bits: 4 or 8.
    """
    middle = 0 if bits == 4 else 128  # our eight-bit codes are signed
    stored: Any = (
        codes.astype(np.uint8) if bits == 4 else (codes.astype(np.int16) - 128).astype(np.int8)
    )
    make: Any = QArray  # of numpy arrays
    return make(
        codes=quant.pack(stored) if bits == 4 else stored,
        scale=scale.astype(np.float32),
        zero=zero.astype(np.float32) - np.float32(middle),
        order=order,
        format="int4" if bits == 4 else "int8",
    )


def integer_shapes(rows: int, columns: int, groups: int, bits: int, ordered: bool) -> QArray:
    """The shapes of `integer_kernel`.

    Raises:
        ValueError: rows cannot be packed, or are no whole number of groups.
    """
    if rows % groups or bits == 4 and rows % PACK_ROWS:
        raise ValueError(
            f"{rows} input features in {groups} groups of {bits} bits cannot be kept quantized "
            f"(they must be a multiple of {PACK_ROWS} and of the groups) - use the original model"
        )
    struct: Any = jax.ShapeDtypeStruct
    return QArray(
        codes=struct((rows // 2, columns), jnp.uint8)
        if bits == 4
        else struct((rows, columns), jnp.int8),
        scale=struct((groups, columns), jnp.float32),
        zero=struct((groups, columns), jnp.float32),
        order=struct((rows,), jnp.int32) if ordered else None,
        format="int4" if bits == 4 else "int8",
    )


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [...] -> the 32 / bits integers in each, lowest bits first, uint8 [..., n]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = np.uint32(2**bits - 1)
    return ((words.view(np.uint32)[..., None] >> shifts) & mask).astype(np.uint8)
