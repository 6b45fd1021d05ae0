"""Our flat parameters as a Hugging Face model folder, adapters merged: `hf` the other way."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import process, quant
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf import Place, is_surplus, places
from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.quantized_save import quantization_config, quantized_tensors
from jaxtune.checkpoint.safetensors import read_along, write_folder
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, dtype_from_name
from jaxtune.distributed import to_host
from jaxtune.errors import WeightError
from jaxtune.models.base import Weight
from jaxtune.peft import lora
from jaxtune.quant import QArray


class Tokenizer(Protocol):
    """What an export needs of a tokenizer."""

    def save_pretrained(self, folder: str, /) -> Any:
        """Writes the tokenizer's files, chat template included."""


def save_model(
    folder: Path,
    params: Mapping[str, Any],
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face model folder; it appears under its name only when complete.

    All processes call it; the first one writes, and gathers one tensor at a time.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        params: our path -> array. LoRA adapters among them are merged, in float32; quantized
            kernels are decoded; base parameters that are not among them are copied from
            `checkpoint`, unrounded by any dtype in between.
        checkpoint: what was fine-tuned: its config, generation config and dtypes are taken over.
        weights: the family's table.
        stacks: number of layers in each stack.
        tokenizer: saved with the model.
        dtype: dtype of all tensors; None: that of each tensor in `checkpoint`.
        quantize: format of `quantized_save.FORMATS` in which bitsandbytes is to load the layers'
            matrices; None: they stay dense.
        max_shard_bytes: size at which a new file is begun.
        record: what else to note in the folder's jaxtune_export.json.

    Raises:
        WeightError: values overflow `dtype`, or files read back differ from what was written.
        StorageError: the folder cannot be written.
        ConfigError: the folder holds other files, or lies inside the source.
    """
    targets = places(weights, _changed(params), stacks)
    tensors = {
        name: TensorInfo(info.shape, dtype_from_name(dtype) if dtype else info.dtype)
        for name, info in checkpoint.tensors.items()
        if name in targets or not is_surplus(checkpoint, weights, name)
    }
    assert targets.keys() <= tensors.keys(), "params are not of this checkpoint"

    def read(name: str) -> np.ndarray:
        if name not in targets:
            return _narrow(name, checkpoint.read(name), tensors[name].dtype)
        place = targets[name]
        array = _merged(params, place, checkpoint, name)
        return place.change.to_hf(_narrow(name, array, tensors[name].dtype))

    config, stored, read_stored = _config(checkpoint, dtype), tensors, read
    if quantize is not None:
        names = _matrices(weights, sum(stacks))
        matrix = next(name for name in tensors if name in names)
        config["quantization_config"] = quantization_config(quantize, tensors[matrix].dtype.name)
        stored, read_stored = quantized_tensors(tensors, read, names, quantize)
    if not process.is_first():
        return read_along(stored, read_stored, max_shard_bytes=max_shard_bytes)
    note = {"kind": "model", "base": checkpoint.name, **(record or {})}
    with replace_folder(folder, note, source=checkpoint.root) as temporary:
        write_folder(temporary, stored, read_stored, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if checkpoint.generation_config is not None:
            write_json(temporary / "generation_config.json", checkpoint.generation_config)
        write_json(temporary / "config.json", config)


def _matrices(weights: Sequence[Weight], num_layers: int) -> set[str]:
    """Hugging Face names of the matrices of all layers."""
    rows = [w for w in weights if w.ours.startswith("layers.") and w.ours.endswith(".kernel")]
    return {row.hf.format(layer) for row in rows for layer in range(num_layers)}


def _changed(params: Mapping[str, Any]) -> dict[str, Any]:
    """The base parameters that training changed: path -> anything with `.shape`."""
    changed = {path: leaf for path, leaf in params.items() if ".adapter." not in path}
    for path, a in params.items():
        if path.endswith(".adapter.a"):
            module = path.removesuffix(".adapter.a")
            shape = (*a.shape[:-1], params[f"{module}.adapter.b"].shape[-1])
            changed.setdefault(f"{module}.kernel", jax.ShapeDtypeStruct(shape, a.dtype))
    return changed


def _merged(
    params: Mapping[str, Any], place: Place, checkpoint: Checkpoint, name: str
) -> np.ndarray:
    """One layer's array on the host, its adapter's product added if it has one."""

    def host(path: str) -> np.ndarray:
        value = params[path]
        if place.index is not None:
            value = jax.tree.map(lambda leaf: leaf[place.index], value)
        if isinstance(value, QArray):
            value = quant.dequantize(value, jnp.float32)
        return to_host(value)

    in_params = place.path in params
    array = host(place.path) if in_params else place.change.to_ours(checkpoint.read(name))
    slot = place.path.removesuffix("kernel") + "adapter."
    if not place.path.endswith(".kernel") or slot + "a" not in params:
        return array
    scale = float(host(slot + "scale"))
    if scale == 0.0:  # a layer of the stack that is not adapted
        return array
    return array.astype(np.float32) + lora.delta(host(slot + "a"), host(slot + "b"), scale)


def _narrow(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise WeightError(
            f"{name} holds values too large for {dtype.name} - export as bfloat16 or float32"
        ) from error


def _config(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    config = {
        key: value for key, value in checkpoint.config.items() if key != "quantization_config"
    }
    if dtype is not None:
        config["dtype"] = dtype
        if "torch_dtype" in config:  # transformers before 4.56
            config["torch_dtype"] = dtype
    return config


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does: indented, sorted keys."""
    write_synced(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
