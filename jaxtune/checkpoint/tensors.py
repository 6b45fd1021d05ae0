"""Named tensors in files: what every source of weights looks like to the rest of the package.

A `Checkpoint` names its tensors as Hugging Face does and reads one at a time. Reading copies bytes
from the file into a fresh array and never maps the file: mapped pages count as resident memory
until the kernel reclaims them, so a mapped 16 GB model would show as 16 GB.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import WeightError
from jaxtune.quant import QArray


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: what the user called it (folder, hub id, package:...), for messages and exports.
        root: the folder or file that holds it.
        config: Hugging Face's config.json, or one made from a GGUF file's metadata.
        generation_config: Hugging Face's generation_config.json, if there is one.
        tensors: Hugging Face tensor name -> shape and dtype, in the order of the file; of a
            quantized weight, those of the dense weight.
        read: Hugging Face tensor name -> the array; a quantized weight is decoded.
        quantized: Hugging Face tensor name -> ShapeDtypeStructs of the kernel (our layout), for
            weights that the files hold quantized.
        read_quantized: Hugging Face tensor name -> that kernel, of numpy arrays.
    """

    name: str
    root: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    quantized: Mapping[str, QArray] = field(default_factory=dict)
    read_quantized: Callable[[str], QArray] | None = None

    @property
    def tokenizer_source(self) -> str:
        """What to load the model's own tokenizer from."""
        return str(self.root)


def dtype_from_name(name: str) -> np.dtype:
    """The numpy dtype called `name`; bfloat16 and the float8 types come from ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, of any dtype and rank."""
    return memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


def read_array(path: Path, offset: int, info: TensorInfo) -> np.ndarray:
    """Reads one little-endian array that starts at byte `offset` of the file."""
    array = np.empty(info.shape, info.dtype)
    view = as_bytes(array)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(view):  # one read returns at most 2 GiB on Linux
            count = file.readinto(view[done:])
            if not count:
                raise WeightError(
                    f"{path} ended {len(view) - done} bytes early: it changed while it was read - "
                    "download or copy the file again"
                )
            done += count
    return array
