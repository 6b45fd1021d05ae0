"""bitsandbytes 4-bit (nf4, fp4) and LLM.int8 weights as transformers saves them.

`quant.bitsandbytes` knows the layouts; here it is which tensors of a model belong together.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoint.prequantized.stored import Read, Stored
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.quant import NestedScale, QArray
from jaxtune.quant.bitsandbytes import STATE, import_bitsandbytes
from jaxtune.quant.qarray import NESTED_BLOCK


def find(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Stored]:
    """The quantized weights among the tensors, by Hugging Face name."""
    del settings  # the tensors say more
    found = {}
    for key in tensors:
        if STATE in key:
            prefix, _, format = key.partition(STATE)
            state = json.loads(read(key).tobytes())
            kernel = _four_bits(format, state)
        elif key.endswith(".SCB"):
            prefix = key.removesuffix("SCB")
            columns, rows = tensors[prefix + "weight"].shape
            kernel = _qarray(_struct(rows, columns, dtype=jnp.int8), _struct(1, columns), "int8")
        else:
            continue
        own = {prefix + part for part in ("weight", "SCB", "weight_format")}
        inner = prefix + "weight."
        parts = [name for name in tensors if name in own or name.startswith(inner)]
        found[prefix + "weight"] = Stored(tuple(parts), kernel)
    return found


def _four_bits(format: str, state: Mapping[str, Any]) -> QArray:
    columns, rows = state["shape"]
    groups = rows // state["blocksize"]
    scale: Any = _struct(groups, columns)
    if "nested_offset" in state:
        scale = NestedScale(
            codes=_struct(groups, columns, dtype=jnp.uint8),
            absmax=_struct(math.ceil(groups * columns / NESTED_BLOCK)),
            offset=_struct(),
        )
    return _qarray(_struct(rows // 2, columns, dtype=jnp.uint8), scale, format)


def _qarray(codes: Any, scale: Any, format: str) -> QArray:
    return QArray(codes, scale, format=format)


def _struct(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def decode(settings: Mapping[str, Any], name: str, arrays: Mapping[str, np.ndarray]) -> QArray:
    """The kernel of one weight.

    Raises:
        WeightError: the tensors do not fit together.
    """
    del settings
    prefix = name.removesuffix("weight")
    tensors = {key.removeprefix(prefix): array for key, array in arrays.items()}
    if "SCB" in tensors:
        shape = tensors["weight"].shape[::-1]
    else:
        state = next(array for key, array in tensors.items() if key.startswith(STATE))
        shape = tuple(json.loads(state.tobytes())["shape"][::-1])
    return import_bitsandbytes(tensors, shape)
