"""A dense model's tensors as the tensors that bitsandbytes would have saved for it."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import WeightError
from jaxtune.quant.bitsandbytes import STATE, export_bitsandbytes

FORMATS = ("nf4", "fp4", "int8")

# The JSON text about a weight is padded to this, because the files' headers are written before any
# weight is quantized. Its longest field is a float.
_STATE_BYTES = 256


def quantized_tensors(
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    names: Collection[str],
    format: str,
    seen: Callable[[str, np.ndarray], None],
) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    """Other tensors, and how to read them: each weight among `names` becomes its parts.

    Args:
        tensors: Hugging Face name -> shape and dtype.
        read: name -> array.
        names: the weights [F, D] to quantize.
        format: one of `FORMATS`; the scales of four-bit formats are quantized too.
        seen: called with the name of each weight and what its parts decode to, float32 [F, D].

    Raises:
        WeightError: a weight's shape does not suit the format.
    """
    result: dict[str, TensorInfo] = {}
    owner: dict[str, str] = {}
    for name, info in tensors.items():
        if name not in names:
            result[name] = info
            continue
        kernel = jax.ShapeDtypeStruct(info.shape[::-1], jnp.float32)
        try:
            like = jax.eval_shape(functools.partial(_quantize, format=format), kernel)
        except ValueError as error:
            raise WeightError(f"{name}: {error}") from error
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        for part, array in _parts(name, zeros, info.dtype).items():
            result[part] = TensorInfo(array.shape, array.dtype)
            owner[part] = name

    @functools.lru_cache(maxsize=1)  # the parts of a weight are read one after another
    def parts_of(name: str) -> dict[str, np.ndarray]:
        kernel = _quantize_on_device(jnp.asarray(read(name).T), format)
        seen(name, np.asarray(quant.dequantize(kernel, jnp.float32)).T)
        return _parts(name, kernel, tensors[name].dtype)

    def read_part(name: str) -> np.ndarray:
        return parts_of(owner[name])[name] if name in owner else read(name)

    return result, read_part


def _quantize(kernel: jax.Array, format: str) -> quant.QArray:
    return quant.quantize(kernel, format, double_quant=format != "int8")


_quantize_on_device = jax.jit(_quantize, static_argnums=1)


def _parts(name: str, kernel: Any, dtype: np.dtype) -> dict[str, np.ndarray]:
    prefix = name.removesuffix("weight")
    parts = {}
    for part, array in export_bitsandbytes(kernel, dtype=dtype.name).items():
        if part.startswith(STATE):
            text = array.tobytes()
            assert len(text) <= _STATE_BYTES, text
            array = np.frombuffer(text.ljust(_STATE_BYTES), np.uint8)
        parts[prefix + part] = array
    return parts


def quantization_config(format: str, dtype: str, dense: Sequence[str]) -> dict[str, Any]:
    """What config.json says of such a model, as transformers 5.23 writes it.

    Args:
        format: one of `FORMATS`.
        dtype: that in which the model computes.
        dense: names of matrices' modules that are not quantized.
    """
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": format != "int8",
        "load_in_8bit": format == "int8",
        "llm_int8_skip_modules": list(dense),
        "llm_int8_threshold": 6.0,
    }
    if format != "int8":
        config |= {
            "bnb_4bit_quant_type": format,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
    return config
