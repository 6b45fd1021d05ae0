"""Checkpoints whose files hold quantized weights: each weight seen as one, kept as it is.

A method is a module with `find` (which tensors make up which weight, and the kernel's shapes) and
`decode` (those tensors -> the kernel, a `QArray` of numpy arrays in our layout).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.checkpoint.prequantized import awq, bitsandbytes, gptq
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, dtype_from_name
from jaxtune.errors import WeightError
from jaxtune.quant import QArray

METHODS = MappingProxyType({"awq": awq, "bitsandbytes": bitsandbytes, "gptq": gptq})


def opened(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """The same checkpoint with every quantized weight under its Hugging Face name.

    Args:
        checkpoint: with the tensors as they are in the files.
        settings: `quantization_config` of its config.json.

    Raises:
        WeightError: of a method, variant or shape that cannot be read.
    """
    method = METHODS.get(settings.get("quant_method", ""))
    if method is None:
        raise WeightError(
            f"{checkpoint.name} is quantized with {settings.get('quant_method')!r}, which jaxtune "
            f"cannot read - use one of {', '.join(METHODS)}, fp8, or the original model"
        )
    try:
        found = method.find(settings, checkpoint.tensors, checkpoint.read)
    except ValueError as error:
        raise WeightError(f"{checkpoint.name}: {error}") from error
    config = checkpoint.config
    dtype = dtype_from_name(config.get("dtype") or config.get("torch_dtype") or "float16")
    parts = {part for weight in found.values() for part in weight.parts}
    tensors = {key: info for key, info in checkpoint.tensors.items() if key not in parts}
    tensors |= {key: TensorInfo(weight.kernel.shape[::-1], dtype) for key, weight in found.items()}

    def read_quantized(key: str) -> QArray:
        arrays = {part: checkpoint.read(part) for part in found[key].parts}
        try:
            return method.decode(settings, key, arrays)
        except ValueError as error:
            raise WeightError(f"{checkpoint.name}: {key}: {error}") from error

    def read(key: str) -> np.ndarray:
        if key not in found:
            return checkpoint.read(key)
        return np.asarray(quant.dequantize(read_quantized(key), jnp.float32)).T.astype(dtype)

    return dataclasses.replace(
        checkpoint,
        config={key: value for key, value in config.items() if key != "quantization_config"},
        tensors=tensors,
        read=read,
        quantized={key: weight.kernel for key, weight in found.items()},
        read_quantized=read_quantized,
    )
