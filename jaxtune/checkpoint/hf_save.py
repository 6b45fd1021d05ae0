"""Our flat parameters as a Hugging Face model folder, adapters merged: `hf` the other way."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import process, quant
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf import Place, is_surplus, joined, places, split_path
from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.quantized_save import quantization_config, quantized_tensors
from jaxtune.checkpoint.safetensors import read_along, write_folder
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, dtype_from_name
from jaxtune.checkpoint.vocabulary import untied
from jaxtune.distributed import to_host
from jaxtune.errors import ConfigError, WeightError
from jaxtune.models import read_config
from jaxtune.models.base import TRANSPOSE, Weight
from jaxtune.peft import Adapters, module_of
from jaxtune.peft.base import EMBEDDING
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
    adapters: Adapters | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face model folder; it appears under its name only when complete.

    All processes call it; the first one writes, and gathers one tensor at a time.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        params: our path -> array. Quantized kernels among them are decoded; base parameters that
            are not among them are copied from `checkpoint`, unrounded by any dtype in between.
        checkpoint: what was fine-tuned: its config, generation config and dtypes are taken over.
        weights: the family's table.
        stacks: number of layers in each stack.
        adapters: what is attached to the base; it is merged, in float32.
        tokenizer: saved with the model.
        dtype: dtype of all tensors; None: that of each tensor in `checkpoint`.
        quantize: format of `quantized_save.FORMATS` in which bitsandbytes is to load the layers'
            matrices; None: they stay dense.
        max_shard_bytes: size at which a new file is begun.

    Raises:
        WeightError: values overflow `dtype`, or files read back differ from what was written.
        StorageError: the folder cannot be written.
        ConfigError: the folder holds other files, or lies inside the source.
    """
    if adapters is not None and EMBEDDING in adapters.choice:
        # A tied head stays the base's.
        tied = read_config(checkpoint.config, checkpoint.name)[1].tie_embeddings
        checkpoint = untied(checkpoint, weights) if tied else checkpoint
    targets = places(weights, _changed(params, adapters, checkpoint, weights, stacks), stacks)
    tensors = {
        name: TensorInfo(info.shape, dtype_from_name(dtype) if dtype else info.dtype)
        for name, info in checkpoint.tensors.items()
        if name in targets or not is_surplus(checkpoint, weights, name)
    }
    assert targets.keys() <= tensors.keys(), "params are not of this checkpoint"

    def read(name: str) -> np.ndarray:
        if name not in targets:
            return _narrow(name, checkpoint.read(name), tensors[name].dtype)
        stored = functools.cache(functools.partial(checkpoint.read, name))
        arrays = [_merged(params, adapters, place, stored) for place in targets[name]]
        arrays = [_narrow(name, array, tensors[name].dtype) for array in arrays]
        return joined(targets[name], arrays, stored)

    config, stored, read_stored = _config(checkpoint, dtype), tensors, read
    if quantize is not None:
        names = _matrices(weights, sum(stacks))
        matrix = next(name for name in tensors if name in names)
        config["quantization_config"] = quantization_config(quantize, tensors[matrix].dtype.name)
        stored, read_stored = quantized_tensors(tensors, read, names, quantize)
    if not process.is_first():
        return read_along(stored, read_stored, max_shard_bytes=max_shard_bytes)
    note = {"kind": "model", "base": checkpoint.name}
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
    if any(row.change is not TRANSPOSE for row in rows):
        raise ConfigError(
            "--quantize: bitsandbytes has no form for this family's matrices, which lie the other "
            "way round (Conv1D) - export them dense"
        )
    return {row.hf.format(layer) for row in rows for layer in range(num_layers)}


def _changed(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    stacks: Sequence[int],
) -> dict[str, Any]:
    """The base parameters that training changed: path -> anything with `.shape`."""
    changed = {path: leaf for path, leaf in params.items() if ".adapter." not in path}
    rows = {row.ours: row for row in weights}
    for path in adapters.layers if adapters is not None else ():
        stack, module = split_path(path)
        lead = () if stack is None else (stacks[stack],)
        for leaf in ("kernel", "table", "bias"):
            row = rows.get(f"{module}.{leaf}")
            info = row and checkpoint.tensors.get(row.hf.format(sum(stacks[: stack or 0])))
            if row and info:
                shape = row.take(np.broadcast_to(np.uint8(0), info.shape)).shape
                like = jax.ShapeDtypeStruct((*lead, *shape), info.dtype)
                changed.setdefault(f"{path}.{leaf}", like)
    return changed


def _merged(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    place: Place,
    stored: Callable[[], np.ndarray],
) -> np.ndarray:
    """One layer's array on the host, its adapter merged if it has one.

    Args:
        params, adapters: see `save_model`.
        place: the array's.
        stored: reads the tensor that holds it, for one that is not in `params`.
    """

    def host(path: str) -> np.ndarray:
        value = params[path]
        if place.index is not None:
            value = jax.tree.map(lambda leaf: leaf[place.index], value)
        if isinstance(value, QArray):
            value = quant.dequantize(value, jnp.float32)
        return to_host(value)

    in_params = place.path in params
    array = host(place.path) if in_params else place.row.take(stored())
    module, _, leaf = place.path.rpartition(".")
    if adapters is None or module not in adapters.layers:
        return array
    config = adapters.layers[module][place.index or 0]
    if config is None:  # a layer of the stack that is not adapted
        return array
    slot = f"{module}.adapter."
    values = {path.removeprefix(slot): host(path) for path in params if path.startswith(slot)}
    return module_of(adapters, module).merge(leaf, array.astype(np.float32), values, config)


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
