"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel save it.

A linear layer [F, D] is stored as qweight int32 [D bits / 32, F] (consecutive rows in a word,
lowest bits first), qzeros int32 [G, F bits / 32], scales [G, F] and g_idx int32 [D], the group of
each row. The format "gptq" stores zeros less one, "gptq_v2" as they are. With act-order
(desc_act) the rows of a group are scattered; they are sorted here, and `QArray.order` says so.
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


def find(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Stored]:
    """The quantized weights among the tensors, by Hugging Face name.

    Raises:
        ValueError: a variant or shape that cannot be kept.
    """
    del read  # shapes say all
    bits = settings.get("bits")
    layout = settings.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"GPTQ with {bits} bits in format {layout!r} cannot be read - use 4 or 8 bits in the "
            "format gptq or gptq_v2"
        )
    found = {}
    for key, info in tensors.items():
        if not key.endswith(".qweight"):
            continue
        prefix = key.removesuffix("qweight")
        names = [prefix + part for part in ("qweight", "qzeros", "scales", "g_idx")]
        parts = tuple(name for name in names if name in tensors)
        words, columns = info.shape
        groups = tensors[prefix + "scales"].shape[0]
        ordered = bool(settings.get("desc_act")) and prefix + "g_idx" in tensors
        try:
            kernel = integer_shapes(words * 32 // bits, columns, groups, bits, ordered)
        except ValueError as error:
            raise ValueError(f"{prefix}weight: {error}") from error
        found[prefix + "weight"] = Stored(parts, kernel)
    return found


def decode(settings: Mapping[str, Any], name: str, arrays: Mapping[str, np.ndarray]) -> QArray:
    """The kernel of one weight."""
    bits = settings["bits"]
    prefix = name.removesuffix("weight")
    words = unpack_words(arrays[prefix + "qweight"], bits)  # [D / n, F, n]
    codes = words.transpose(0, 2, 1).reshape(-1, words.shape[1])
    zeros = arrays[prefix + "qzeros"]
    zero = unpack_words(zeros, bits).reshape(zeros.shape[0], -1)
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zero = (zero.astype(np.int32) + 1) & (2**bits - 1)
    scale = arrays[prefix + "scales"]
    groups = arrays.get(prefix + "g_idx")
    order = None
    if groups is not None:
        expected = np.arange(len(codes)) // (len(codes) // len(scale))
        sorted_rows = np.argsort(groups, kind="stable").astype(np.int32)
        if not np.array_equal(groups[sorted_rows], expected):
            raise ValueError("g_idx gives groups different numbers of rows - quantize it again")
        if settings.get("desc_act"):
            order, codes = sorted_rows, codes[sorted_rows]
        elif not np.array_equal(groups, expected):
            raise ValueError("g_idx is not in order, but desc_act is false - correct config.json")
    return integer_kernel(codes, scale, zero[:, : codes.shape[1]], order, bits)
