"""AWQ (arXiv 2306.00978) in AutoAWQ's "gemm" layout.

A linear layer [F, D] is stored as qweight int32 [D, F / 8] (eight columns in a word, in the order
0 2 4 6 1 3 5 7 from the lowest bits), qzeros int32 [G, F / 8] likewise, and scales [G, F].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.checkpoint.prequantized.stored import (
    Read,
    Stored,
    integer_kernel,
    integer_shapes,
    unpack_words,
)
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.quant import QArray

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def find(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Stored]:
    """The quantized weights among the tensors, by Hugging Face name.

    Raises:
        ValueError: a variant or shape that cannot be kept.
    """
    del read  # shapes say all
    bits, layout = settings.get("bits"), str(settings.get("version", "gemm")).lower()
    if bits != 4 or layout != "gemm" or not settings.get("zero_point", True):
        raise ValueError(
            f"AWQ with {bits} bits, version {layout!r}, zero_point "
            f"{settings.get('zero_point', True)} cannot be read - use 4 bits, gemm, zero points"
        )
    found = {}
    for key, info in tensors.items():
        if not key.endswith(".qweight"):
            continue
        prefix = key.removesuffix("qweight")
        rows, words = info.shape
        groups = tensors[prefix + "scales"].shape[0]
        try:
            kernel = integer_shapes(rows, words * 8, groups, bits, ordered=False)
        except ValueError as error:
            raise ValueError(f"{prefix}weight: {error}") from error
        parts = tuple(prefix + part for part in ("qweight", "qzeros", "scales"))
        found[prefix + "weight"] = Stored(parts, kernel)
    return found


def decode(settings: Mapping[str, Any], name: str, arrays: Mapping[str, np.ndarray]) -> QArray:
    """The kernel of one weight."""
    del settings  # `find` accepts one variant only
    prefix = name.removesuffix("weight")
    codes, zero = (_columns(arrays[prefix + part]) for part in ("qweight", "qzeros"))
    return integer_kernel(codes, arrays[prefix + "scales"], zero, None, bits=4)


def _columns(words: np.ndarray) -> np.ndarray:
    """int32 [rows, F / 8] -> uint8 [rows, F]."""
    packed = unpack_words(words, 4)  # [rows, F / 8, 8]
    columns = np.empty_like(packed)
    columns[..., _COLUMNS] = packed
    return columns.reshape(len(words), -1)
