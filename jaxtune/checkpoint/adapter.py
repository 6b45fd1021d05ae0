"""Reads and writes adapters as Hugging Face PEFT folders.

`adapter_model.safetensors` holds `base_model.model.<module>.<suffix>`, where <module> is the
layer's path in the transformers model, which follows from the family's WEIGHTS table, and <suffix>
names a variable of the method (`tensors` of its module). Ours are stacked, and kernels are
transposed: `layers.<s>.attn.q_proj.adapter.a` [n, in, R] is `lora_A.weight` [R, in] of n layers.

PEFT ignores what it does not expect; here missing, extra and mis-shaped tensors are errors.

Source: PEFT 0.21.2 (utils/save_and_load.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import process
from jaxtune.checkpoint.adapter_config import (
    CONFIG_FILE,
    Module,
    config_fields,
    modules,
    read_adapters,
    read_config,
)
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.fused import Whole, joined, separated, wholes, with_room
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import (
    read_along,
    read_header,
    read_tensor,
    refuse_pickle,
    write_folder,
)
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.distributed import to_host
from jaxtune.errors import WeightError, listing
from jaxtune.models.base import Weight
from jaxtune.peft import METHODS, Adapters
from jaxtune.peft.base import Tensor, padded, shapes

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter read from disk.

    Attributes:
        adapters: what `peft.attach` takes.
        params: path of each variable that is stored -> float32 array.
        warnings: what looks wrong but may be meant.
    """

    adapters: Adapters
    params: dict[str, np.ndarray]
    warnings: tuple[str, ...]


class Stored(NamedTuple):
    """A tensor of the folder and where it belongs."""

    whole: Whole
    leaf: str  # which of our variables
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the folder."""
        return self.tensor.change.to_hf(np.broadcast_to(np.uint8(0), self.tensor.shape)).shape


def stored_tensors(
    method: str, adapted: Sequence[Whole], base_params: Mapping[str, Any]
) -> dict[str, Stored]:
    """Name in the folder -> place, for every tensor of the adapters.

    Args:
        method: its name.
        adapted: its layers.
        base_params: path -> anything with `.shape`, of the base model.
    """
    found = {}
    for whole in adapted:
        d_in, d_out = base_params[f"{whole.first.path}.kernel"].shape[-2:]
        d_out = sum(map(len, whole.columns)) or d_out
        for leaf, tensor in METHODS[method].tensors(whole.config, d_in, d_out).items():
            found[f"{_PREFIX}{whole.name}.{tensor.suffix}"] = Stored(whole, leaf, tensor)
    return found


def save_adapter(
    folder: Path,
    params: Mapping[str, Any],
    adapters: Adapters,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes a PEFT folder; it appears under its name only when complete and checked.

    All processes call it; the first one writes.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        params: path -> array; the adapters' variables among them are written, float32.
        adapters: what is attached to the base.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.
        base: name of the base model, for base_model_name_or_path.
        revision: its revision, when it is a hub id.
    """
    adapted = [with_room(whole) for whole in wholes(modules(weights, adapters, stacks), weights)]
    stored = stored_tensors(adapters.method, adapted, base_params)

    def variable(part: Module, leaf: str) -> np.ndarray:
        array = params[f"{part.path}.adapter.{leaf}"]
        return to_host(array if part.index is None else array[part.index])

    def read(key: str) -> np.ndarray:
        whole, leaf, tensor = stored[key]
        leaves = "ab" if whole.columns else (leaf,)
        values = [
            None if part is None else {name: variable(part, name) for name in leaves}
            for part in whole.parts
        ]
        array = joined(whole, values)[leaf]
        own = array[tuple(slice(size) for size in tensor.shape)]
        return tensor.change.to_hf(own.astype(np.float32, copy=False))

    tensors = {key: TensorInfo(entry.shape, _FLOAT32) for key, entry in stored.items()}
    size = sum(info.nbytes for info in tensors.values())
    if not process.is_first():
        return read_along(tensors, read, max_shard_bytes=size)
    with replace_folder(folder, {"kind": "adapter", "base": base}) as temporary:
        write_folder(temporary, tensors, read, stem="adapter_model", max_shard_bytes=size)
        layers = [whole.first._replace(config=whole.config) for whole in adapted]
        fields = config_fields(adapters, layers, weights, sum(stacks))
        fields |= {"base_model_name_or_path": base, "revision": revision}
        write_json(temporary / CONFIG_FILE, fields)


def load_adapter(
    folder: Path,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    base: str,
) -> Adapter:
    """Reads a PEFT folder for a base model, to train it further or to merge it.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.
        base: name of the base model; a warning if the adapter names another.

    Raises:
        WeightError: not an adapter that jaxtune knows, a setting that it does not have, targets
            that the base lacks, or tensors that are missing, extra, mis-shaped or not finite (all
            listed).
    """
    kernels = [path.removesuffix(".kernel") for path in base_params if path.endswith(".kernel")]
    adapters = read_adapters(folder, kernels, weights, stacks)
    adapted = wholes(modules(weights, adapters, stacks), weights)
    adapters, params = _read_params(folder, adapters, adapted, base_params)
    trained_on = read_config(folder)[1].get("base_model_name_or_path")
    warnings = ()
    if trained_on and Path(trained_on).name != Path(base).name:
        warnings = (f"{folder} was trained on {trained_on!r}; it is used on {base!r}",)
    return Adapter(adapters, params, warnings)


def _read_params(
    folder: Path, adapters: Adapters, adapted: Sequence[Whole], base_params: Mapping[str, Any]
) -> tuple[Adapters, dict[str, np.ndarray]]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise WeightError(f"{folder} holds no {WEIGHTS_FILE} - copy the whole adapter folder")
    in_file = read_header(path)
    expected = stored_tensors(adapters.method, adapted, base_params)
    values: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, entry in expected.items():
        if key not in in_file:
            problems.append(f"missing: {key}")
        elif in_file[key].info.shape != entry.shape:
            shapes = f"{list(in_file[key].info.shape)}, base and r ask for {list(entry.shape)}"
            problems.append(f"wrong shape: {key} is {shapes}")
        else:
            array = entry.tensor.change.to_ours(read_tensor(in_file[key]).astype(np.float32))
            if not np.isfinite(array).all():
                problems.append(f"NaN or infinity: {key}")
            values.setdefault(entry.whole.name, {})[entry.leaf] = array
    problems += [f"unexpected: {key}" for key in in_file if key not in expected]
    if problems:
        raise WeightError(
            f"{path}: {len(problems)} tensors do not fit the base model and {CONFIG_FILE} - use "
            "the adapter's own base model:" + listing(problems, limit=len(problems))
        )
    parts = [part for whole in adapted for part in separated(whole, values[whole.name])]
    choice = {path: list(configs) for path, configs in adapters.choice.items()}
    for module, config, _ in parts:
        choice[module.path][module.index or 0] = config
    own = {path: tuple(configs) for path, configs in choice.items()}
    adapters = dataclasses.replace(adapters, choice=own)
    params = _empty(adapters, base_params)
    for module, _, arrays in parts:
        for leaf, array in arrays.items():
            stack = params[f"{module.path}.adapter.{leaf}"]
            place = stack[... if module.index is None else module.index]
            place[...] = padded(array, place.shape)
    return adapters, params


def _empty(adapters: Adapters, base_params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Zeros for every variable of the adapters that is stored."""
    params = {}
    for path, configs in adapters.choice.items():
        *stack, d_in, d_out = base_params[f"{path}.kernel"].shape
        sizes = shapes(METHODS[adapters.method].tensors, configs, d_in, d_out)
        for leaf, size in sizes.items():
            params[f"{path}.adapter.{leaf}"] = np.zeros((*stack, *size), np.float32)
    return params
