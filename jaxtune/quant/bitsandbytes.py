"""Quantized kernels as the tensors that bitsandbytes keeps in Hugging Face files, and back.

The layouts are those of bitsandbytes 0.50.2: `nn.Linear4bit` with `QuantState.as_dict(packed=True)`
and `nn.Linear8bitLt`. Its weight is [F, D], ours [D, F]. Everything here is numpy on the host, so
that one layer at a time can pass from a file to the devices.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.errors import WeightError
from jaxtune.quant import nested
from jaxtune.quant.codebook import BOOKS
from jaxtune.quant.int8 import LARGEST
from jaxtune.quant.qarray import NESTED_BLOCK, PACK_ROWS, NestedScale, QArray, pack, unpack

STATE = "weight.quant_state.bitsandbytes__"
ROW_FORMAT = 0  # of LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING; the others were for older processors


def export_bitsandbytes(q: QArray, *, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """The tensors of a layer by their names in its state_dict, "weight" first.

    Four bits: "weight" uint8 [F D / 2, 1], "weight.absmax", "weight.quant_map", for nested scales
    "weight.nested_absmax" and "weight.nested_quant_map", and a JSON text as bytes. int8: "weight"
    int8 [F, D], "SCB" float32 [F] and "weight_format".

    Args:
        q: an unstacked kernel in nf4, fp4 or int8 with one scale per column.
        dtype: torch's name of the type that bitsandbytes dequantizes to.

    Raises:
        ValueError: bitsandbytes has no such layer.
    """
    q = jax.tree.map(np.asarray, q)
    rows, columns = q.shape[-2:]
    plain = q.zero is None and q.order is None and len(q.shape) == 2
    if plain and q.format == "int8" and q.group_rows == rows:
        return {
            "weight": np.ascontiguousarray(q.codes.T),
            "SCB": np.asarray(q.scale)[0] * np.float32(LARGEST),
            "weight_format": np.array(ROW_FORMAT, np.uint8),
        }
    if not plain or q.format not in BOOKS:
        raise ValueError(
            f"bitsandbytes has no layer for a kernel {q.shape} in {q.format} with groups of "
            f"{q.group_rows} rows: it has nf4, fp4 and int8 with one scale per column - "
            "dequantize it first"
        )
    codes = np.asarray(unpack(q.codes)).T.reshape(-1, 2)
    tensors: dict[str, np.ndarray] = {"weight": (codes[:, :1] << 4) | codes[:, 1:]}
    state = {
        "quant_type": q.format,
        "blocksize": q.group_rows,
        "dtype": dtype,
        "shape": [columns, rows],
    }
    if isinstance(q.scale, NestedScale):
        tensors |= {
            "weight.absmax": np.asarray(q.scale.codes).T.reshape(-1),
            "weight.quant_map": BOOKS[q.format],
            "weight.nested_absmax": np.asarray(q.scale.absmax),
            "weight.nested_quant_map": nested.dynamic_map(),
        }
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(q.scale.offset),
        }
    else:
        tensors["weight.absmax"] = np.asarray(q.scale).T.reshape(-1)
        tensors["weight.quant_map"] = BOOKS[q.format]
    tensors[STATE + q.format] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def import_bitsandbytes(tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> QArray:
    """The kernel [D, F] of a layer's tensors, in arrays of numpy; the inverse of the export.

    Args:
        tensors: by their names in the layer's state_dict; others, such as a bias, are ignored.
        shape: (D, F), the kernel's shape according to the model.

    Raises:
        WeightError: the tensors are not those of such a layer, or its blocks cross its rows.
    """
    try:
        return _import_int8(tensors, shape) if "SCB" in tensors else _import_4bit(tensors, shape)
    except KeyError as error:
        raise WeightError(
            f"a layer quantized by bitsandbytes lacks its tensor {error} - convert the model again"
        ) from None


def _import_int8(tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> QArray:
    weight = tensors["weight"]
    _check("its layout", int(tensors.get("weight_format", ROW_FORMAT)), ROW_FORMAT)
    _check("its shape", weight.shape[::-1], shape)
    scale = tensors["SCB"].astype(np.float32)[None] / np.float32(LARGEST)
    return _qarray(np.ascontiguousarray(weight.T), scale, "int8")


def _import_4bit(tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> QArray:
    format = "fp4" if STATE + "fp4" in tensors else "nf4"
    state = json.loads(np.asarray(tensors[STATE + format], np.uint8).tobytes())
    rows, columns = shape
    _check("its shape", tuple(state["shape"]), (columns, rows))
    if rows % state["blocksize"] or rows % PACK_ROWS:
        raise WeightError(
            f"a layer quantized by bitsandbytes has {rows} input features, not a multiple of "
            f"{PACK_ROWS} and of its block size {state['blocksize']}, so that blocks cross its "
            "rows - use the model before it was quantized"
        )
    _check_map(tensors["weight.quant_map"], BOOKS[format])
    # Whatever type it is stored as (bnb_4bit_quant_storage), it is bytes.
    weight = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    _check("its number of bytes", weight.size, rows * columns // 2)
    codes: Any = np.stack([weight >> 4, weight & 15], axis=-1).reshape(columns, rows).T
    scale: Any = tensors["weight.absmax"].reshape(columns, rows // state["blocksize"]).T
    if "weight.nested_absmax" not in tensors:
        return _qarray(pack(codes), scale.astype(np.float32), format)
    _check("its nested block size", state["nested_blocksize"], NESTED_BLOCK)
    _check_map(tensors["weight.nested_quant_map"], nested.dynamic_map())
    absmax: Any = tensors["weight.nested_absmax"].astype(np.float32)
    offset: Any = np.float32(state["nested_offset"])
    return _qarray(pack(codes), NestedScale(scale.copy(), absmax, offset), format)


def _qarray(codes: Any, scale: Any, format: str) -> QArray:
    return QArray(codes, scale, format=format)


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise WeightError(
            f"a layer quantized by bitsandbytes does not fit: {what} is {found}, expected "
            f"{expected} - is config.json that of this model?"
        )


def _check_map(found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5, atol=1e-7):
        raise WeightError(
            "a layer quantized by bitsandbytes has a quantization map of its own, which is not "
            "supported - use the model before it was quantized"
        )
