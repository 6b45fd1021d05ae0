"""Our flat parameters as a Hugging Face model folder, adapters merged: `hf` the other way."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtune import process
from jaxtune.checkpoint.adapted import changed, own, with_adapter
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf import Place, is_surplus, joined, places
from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.quantized_save import quantization_config, quantized_tensors
from jaxtune.checkpoint.rounding import Roundings
from jaxtune.checkpoint.safetensors import read_along, write_folder
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, dtype_from_name
from jaxtune.checkpoint.vocabulary import untied
from jaxtune.errors import ConfigError, WeightError
from jaxtune.log import info
from jaxtune.models import read_config
from jaxtune.models.base import TRANSPOSE, Weight
from jaxtune.models.heads import head_of
from jaxtune.peft import Adapters
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

    All processes call it; the first one writes, and gathers one tensor at a time. How far merged
    weights are from those in float32, as they are stored, is logged and noted in the folder.

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
    targets = places(weights, changed(params, adapters, checkpoint, weights, stacks), stacks)
    tensors = {
        name: TensorInfo(info.shape, dtype_from_name(dtype) if dtype else info.dtype)
        for name, info in checkpoint.tensors.items()
        if name in targets or not is_surplus(checkpoint, weights, name)
    }
    assert targets.keys() <= tensors.keys(), "params are not of this checkpoint"

    roundings = Roundings()
    read = _reader(params, checkpoint, adapters, targets, tensors, roundings)
    config, stored, read_stored = _config(checkpoint, dtype), tensors, read
    if tokenizer is not None and head_of(config) is not None and config.get("pad_token_id") is None:
        # transformers looks for the last token of a text by it, and refuses batches without.
        config["pad_token_id"] = getattr(tokenizer, "pad_token_id", None)
    if quantize is not None:
        names = _matrices(weights, sum(stacks))
        matrix = next(name for name in tensors if name in names)
        config["quantization_config"] = quantization_config(
            quantize, tensors[matrix].dtype.name, _outside(weights)
        )
        seen = roundings.stored
        stored, read_stored = quantized_tensors(tensors, read, names, quantize, seen)
    if not process.is_first():
        return read_along(stored, read_stored, max_shard_bytes=max_shard_bytes)
    note: dict[str, Any] = {"kind": "model", "base": checkpoint.name}
    with replace_folder(folder, note, source=checkpoint.root) as temporary:
        write_folder(temporary, stored, read_stored, max_shard_bytes=max_shard_bytes)
        if roundings.errors:
            decoded = any(isinstance(leaf, QArray) for leaf in params.values())
            note["merge_base"] = "dequantized" if decoded else "original"
            note["merge"] = roundings.summary()
            info(str(roundings))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if checkpoint.generation_config is not None:
            write_json(temporary / "generation_config.json", checkpoint.generation_config)
        write_json(temporary / "config.json", config)


def _reader(
    params: Mapping[str, Any],
    checkpoint: Checkpoint,
    adapters: Adapters | None,
    targets: Mapping[str, Sequence[Place]],
    tensors: Mapping[str, TensorInfo],
    roundings: Roundings,
) -> Callable[[str], np.ndarray]:
    """Makes the tensors that are to be stored, in the dtypes of `tensors`, and notes roundings."""

    def read(name: str) -> np.ndarray:
        dtype = tensors[name].dtype
        if name not in targets:
            return _narrow(name, checkpoint.read(name), dtype)
        stored, parts = functools.cache(functools.partial(checkpoint.read, name)), targets[name]
        before = [own(params, place, stored) for place in parts]
        after = [with_adapter(params, adapters, *pair) for pair in zip(parts, before, strict=True)]
        if all(new is old for new, old in zip(after, before, strict=True)):
            return joined(parts, [_narrow(name, array, dtype) for array in before], stored)
        merged, base = (
            joined(parts, [array.astype(np.float32) for array in arrays], stored)
            for arrays in (after, before)
        )
        roundings.merged(name, merged, base)
        result = _narrow(name, merged, dtype)
        roundings.stored(name, result)
        return result

    return read


def _matrices(weights: Sequence[Weight], num_layers: int) -> set[str]:
    """Hugging Face names of the matrices of all layers."""
    rows = [w for w in weights if w.ours.startswith("layers.") and w.ours.endswith(".kernel")]
    if any(row.experts for row in rows):
        raise ConfigError(
            "--quantize: transformers keeps experts in arrays that bitsandbytes does not quantize, "
            "so most of the model would stay dense - export it dense"
        )
    if any(row.change is not TRANSPOSE for row in rows):
        raise ConfigError(
            "--quantize: bitsandbytes has no form for this family's matrices, which lie the other "
            "way round (Conv1D) - export them dense"
        )
    return {name for row in rows for layer in range(num_layers) for name in row.names(layer)}


def _outside(weights: Sequence[Weight]) -> list[str]:
    """Hugging Face names of the modules with matrices outside the layers."""
    rows = (row for row in weights if row.ours.endswith(".kernel"))
    return sorted({row.hf.rpartition(".")[0] for row in rows if "{}" not in row.hf})


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
