"""Reads and writes adapters as Hugging Face PEFT folders.

`adapter_model.safetensors` holds `base_model.model.<module>.<suffix>`, where <module> is the
layer's path in the transformers model, which follows from the family's WEIGHTS table, and <suffix>
names a variable of the method (`tensors` of its module). Ours are stacked, and kernels are
transposed: `layers.<s>.attn.q_proj.adapter.a` [n, in, R] is `lora_A.weight` [R, in] of n layers.

PEFT ignores what it does not expect; here missing, extra and mis-shaped tensors are errors.

Source: PEFT 0.21.2 (utils/save_and_load.py).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import peft, process
from jaxtune.checkpoint import expert_parameters
from jaxtune.checkpoint.adapter_config import (
    CONFIG_FILE,
    Module,
    config_fields,
    modules,
    read_config,
)
from jaxtune.checkpoint.adapter_file import read_tensors, require_same
from jaxtune.checkpoint.adapter_layers import read_adapters
from jaxtune.checkpoint.adapter_slot import read_slot
from jaxtune.checkpoint.adapter_start import on_whole_base
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.fused import (
    Arrays,
    Whole,
    joined,
    require_supported,
    separated,
    tensors_of,
    wholes,
    with_room,
)
from jaxtune.checkpoint.hf import Place, places, stored_shape
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import read_along, write_folder
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.distributed import to_device, to_host
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.peft import METHODS, Adapters, fills_one_slot, tokens
from jaxtune.peft.base import EMBEDDING, Tensor, common, padded, shapes
from jaxtune.peft.split import AGAIN

_PREFIX = "base_model.model."
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter read from disk.

    Attributes:
        adapters: what `peft.attach` takes.
        params: path of each variable that is stored -> float32 array.
        warnings: what looks wrong but may be meant.
        partial: stacked biases of the base of which the folder has some layers only; the others in
            `params` are the base's.
    """

    adapters: Adapters
    params: dict[str, np.ndarray]
    warnings: tuple[str, ...]
    partial: tuple[str, ...] = ()


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
    adapters: Adapters, adapted: Sequence[Whole], base_params: Mapping[str, Any]
) -> dict[str, Stored]:
    """Name in the folder -> place, for every tensor of the adapters.

    Args:
        adapters: the method.
        adapted: its layers.
        base_params: path -> anything with `.shape`, of the base model.
    """
    found = {}
    names = {whole.name for whole in adapted}
    for whole in adapted:
        is_parameter, name = whole.first.is_parameter, whole.name
        module = expert_parameters.wrapper(name, names) if is_parameter else name
        for leaf, tensor in tensors_of(adapters, whole, base_params).items():
            found[f"{_PREFIX}{module}.{tensor.suffix}"] = Stored(whole, leaf, tensor)
    return found


def places_beside(
    adapters: Adapters,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
) -> dict[str, Place]:
    """Name in the folder -> place, for every tensor of the base that trains beside the adapters.

    Raises:
        ConfigError: one of them is a part of a tensor.
    """
    adapted = {module.name for module in modules(weights, adapters, stacks)}
    beside = {name: base_params[name] for name in sorted(adapters.saved | adapters.biases)}
    found = {}
    for name, parts in places(weights, beside, stacks).items():
        if parts[0].row.columns is not None or parts[0].row.experts:
            raise ConfigError(
                f"config.peft: {parts[0].path} is part of {name} in this family's files, so it "
                "cannot train beside an adapter - leave it out of modules_to_save and bias"
            )
        module, _, leaf = name.rpartition(".")
        layer = f"{module}.base_layer" if module in adapted else module
        found[f"{_PREFIX}{layer}.{leaf}"] = parts[0]
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
    task_type: str = "CAUSAL_LM",
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
        task_type: what PEFT calls the model's task.
    """
    adapted = [with_room(whole) for whole in wholes(adapters, weights, stacks)]
    stored = stored_tensors(adapters, adapted, base_params)
    beside = places_beside(adapters, base_params, weights, stacks)
    fixed = _fixed(adapters)

    def variable(part: Module, leaf: str) -> np.ndarray:
        array = params[f"{part.path}.adapter.{leaf}"]
        return to_host(array[part.index])

    def read(key: str) -> np.ndarray:
        if key in fixed:
            return fixed[key]
        if key in beside:
            path, index, _, row, *_ = beside[key]
            array = to_host(params[path][index])
            return row.change.to_hf(array.astype(np.float32, copy=False))
        whole, leaf, tensor = stored[key]
        values = [None if part is None else variable(part, leaf) for part in whole.parts]
        array = joined(whole, tensor, values)
        own = array[tuple(slice(size) for size in tensor.shape)]
        return tensor.change.to_hf(own.astype(np.float32, copy=False))

    sizes = {key: entry.shape for key, entry in (stored | fixed).items()}
    sizes |= {key: stored_shape((place,)) for key, place in beside.items()}
    tensors = {key: TensorInfo(shape, _FLOAT32) for key, shape in sizes.items()}
    size = sum(info.nbytes for info in tensors.values())
    if not process.is_first():
        return read_along(tensors, read, max_shard_bytes=size)
    with replace_folder(folder, {"kind": "adapter", "base": base}) as temporary:
        write_folder(temporary, tensors, read, stem="adapter_model", max_shard_bytes=size)
        layers = [whole.first._replace(config=whole.config) for whole in adapted]
        fields = config_fields(adapters, layers, weights, stacks, task_type)
        fields |= {"base_model_name_or_path": base, "revision": revision}
        write_json(temporary / CONFIG_FILE, fields)


def load_adapter(
    folder: Path,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    base: Checkpoint,
) -> Adapter:
    """Reads a PEFT folder for a base model, to train it further or to merge it.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.
        base: the base model; a warning if the adapter names another.

    Raises:
        WeightError: not an adapter that jaxtune knows, a setting that it does not have, targets
            that the base lacks, tensors that are missing, extra, mis-shaped or not finite (all
            listed), an embedding that is not the base's, or a quantized base of an adapter that
            started as a part of it.
    """
    method, fields = read_config(folder)
    if fills_one_slot(method):
        found = read_slot(folder, method, fields, base_params, stacks)
        return Adapter(*found, _warnings(folder, fields, base.name))
    if fields.get("target_parameters"):
        weights = expert_parameters.as_parameters(weights, base_params)
    adapters = read_adapters(folder, base_params, weights, stacks)
    require_supported(adapters, base_params, weights, stacks)
    adapted = wholes(adapters, weights, stacks)
    stored = stored_tensors(adapters, adapted, base_params)
    beside = places_beside(adapters, base_params, weights, stacks)
    sizes = {key: entry.shape for key, entry in stored.items()}
    partial = {} if fields.get("bias") == "all" else _of_others(adapters, beside)
    sizes |= {key: stored_shape((place,)) for key, place in beside.items() if key not in partial}
    copies = _copies(adapted)
    others = {*copies, *_tied_rows(adapters, weights)}
    arrays = read_tensors(folder, sizes, _fixed(adapters), others)
    require_same(folder, copies, base)
    read: dict[str, dict[str, np.ndarray]] = {}
    for key, entry in stored.items():
        array = entry.tensor.change.to_ours(arrays[key])
        read.setdefault(entry.whole.name, {})[entry.leaf] = array
    values: Mapping[str, Arrays] = read
    if (start := str(fields.get("init_lora_weights"))) in AGAIN:
        adapters, adapted, values = on_whole_base(start, adapters, adapted, values, weights, base)
    adapters, params = _separated(adapters, adapted, values, base_params)
    arrays |= {key: base.read(key.removeprefix(_PREFIX)) for key in partial}
    for key, (path, index, _, row, *_) in beside.items():
        stack = params.setdefault(path, np.zeros(base_params[path].shape, np.float32))
        stack[index] = row.change.to_ours(arrays[key])
    incomplete = tuple(sorted({place.path for place in partial.values()}))
    return Adapter(adapters, params, _warnings(folder, fields, base.name), incomplete)


def _of_others(adapters: Adapters, beside: Mapping[str, Place]) -> dict[str, Place]:
    """The biases of layers that are not adapted, in stacks with others that are."""
    found = {}
    for key, place in beside.items():
        configs = adapters.choice.get(place.path.removesuffix(".bias"), ())
        if configs and configs[place.position] is None and place.path in adapters.biases:
            found[key] = place
    return found


def _tied_rows(adapters: Adapters, weights: Sequence[Weight]) -> set[str]:
    """What PEFT's TRAINABLE_TOKENS calls the embedding's rows a second time, in a tied head."""
    if adapters.method != "tokens" or tokens.HEAD in adapters.rows:
        return set()
    head = next(row.hf for row in weights if row.ours == peft.weight_name(tokens.HEAD))
    (rows,) = adapters.rows[EMBEDDING]
    stored = tokens.tensors(rows, 0, 0).values()
    return {f"{_PREFIX}{head.removesuffix('.weight')}.{tensor.suffix}" for tensor in stored}


def _copies(adapted: Sequence[Whole]) -> dict[str, str]:
    """Name in the folder -> name in the base, of base weights that PEFT saves beside an adapter."""
    names = [whole.name for whole in adapted if whole.first.path == EMBEDDING]
    return {f"{_PREFIX}{name}.base_layer.weight": f"{name}.weight" for name in names}


def _warnings(folder: Path, fields: Mapping[str, Any], base: str) -> tuple[str, ...]:
    """What looks wrong about an adapter of a base model, but may be meant."""
    trained_on = fields.get("base_model_name_or_path")
    if not trained_on or _short(trained_on) == _short(base):
        return ()
    return (f"{folder} was trained on {trained_on!r}; it is used on {base!r}",)


def _short(name: str) -> tuple[str, ...]:
    """A model's name without the folders above it, and the adapters that were merged into it."""
    model, *merged = name.split(" + ")
    return Path(model).name, *merged


def _fixed(adapters: Adapters) -> dict[str, np.ndarray]:
    """The tensors of the folder that follow from the knobs."""
    method = METHODS[adapters.method]
    if not hasattr(method, "fixed"):
        return {}
    return method.fixed(common(next(iter(adapters.choice.values()))))


def _separated(
    adapters: Adapters,
    adapted: Sequence[Whole],
    values: Mapping[str, Mapping[str, np.ndarray]],
    base_params: Mapping[str, Any],
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """The adapters of our layers, and their variables, from those of the transformers model."""
    parts = [
        part
        for whole in adapted
        for part in separated(whole, tensors_of(adapters, whole, base_params), values[whole.name])
    ]
    choice = {path: list(configs) for path, configs in adapters.layers.items()}
    for module, config, _ in parts:
        choice[module.path][module.position] = config
    own = {path: tuple(choice[path]) for path in adapters.choice}
    adapters = dataclasses.replace(adapters, choice=own)
    params = _empty(adapters, base_params)
    for module, _, arrays in parts:
        for leaf, array in arrays.items():
            stack = params[f"{module.path}.adapter.{leaf}"]
            place = stack[module.index]
            place[...] = padded(array, place.shape)
    return adapters, params


def _empty(adapters: Adapters, base_params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Zeros for every variable of the adapters that is stored."""
    params = {}
    for path, configs in adapters.layers.items():
        *stack, d_in, d_out = base_params[peft.weight_name(path)].shape
        sizes = shapes(peft.module_of(adapters, path).tensors, configs, d_in, d_out)
        for leaf, size in sizes.items():
            params[f"{path}.adapter.{leaf}"] = np.zeros((*stack, *size), np.float32)
    return params


def first_values(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    adapters: Adapters,
    stacks: Sequence[int],
    base: Mapping[str, Any],
    *,
    stored: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, jax.Array]:
    """First values of an adapter's variables on the devices.

    Args:
        shapes: name -> shape, dtype and sharding of every variable.
        adapters: the method and the adapted layers.
        stacks: number of layers in each stack.
        base: the base's parameters by name.
        stored: values read from a folder, which come first.
        seed: of the random numbers.
    """
    found = {}
    for name in sorted(shapes):
        where = shapes[name].sharding
        if name in stored:
            found[name] = to_device(stored[name], where)
            continue
        kernel = base.get(peft.weight_name(name.split(".adapter.")[0]))  # None: of no layer
        follow = functools.partial(peft.value_from_kernel, name, adapters)
        if kernel is not None and jax.eval_shape(follow, kernel) is not None:
            found[name] = jax.jit(follow, out_shardings=where)(kernel)
        else:
            value = peft.initial_value(name, shapes[name].shape, adapters, stacks, seed)
            found[name] = to_device(value, where)
    return found
