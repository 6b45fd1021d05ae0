"""Applies a family's WEIGHTS table both ways: Hugging Face tensors <-> our flat parameters.

Names and shapes are checked in full before a byte is read. Then tensors stream one at a time from
the file into device arrays of any sharding: a stack of layers is allocated once on the devices and
filled in place, so host memory above the final arrays stays below twice the largest tensor.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.safetensors import write_folder
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, dtype_from_name
from jaxtune.distributed import to_device
from jaxtune.errors import WeightError, listing
from jaxtune.models.base import Change, Weight
from jaxtune.peft import lora

# Buffers that old versions of transformers saved; they follow from the config.
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Tokenizer(Protocol):
    """What an export needs of a tokenizer."""

    def save_pretrained(self, folder: str, /) -> Any:
        """Writes the tokenizer's files, chat template included."""


class Place(NamedTuple):
    """Where a Hugging Face tensor lives among our parameters."""

    path: str
    index: int | None  # position on the leading axis of its stack; None outside the layers
    layer: int | None  # number of the layer in the model
    change: Change
    shape: tuple[int, ...]  # Hugging Face's shape


def places(
    weights: Sequence[Weight], abstract: Mapping[str, Any], stacks: Sequence[int]
) -> dict[str, Place]:
    """Hugging Face name -> place, for every tensor that fills `abstract`.

    Args:
        weights: the family's table.
        abstract: our path -> anything with `.shape`; base parameters only, no adapters.
        stacks: number of layers in each stack.
    """
    rows = {row.ours: row for row in weights}
    found = {}
    for path, leaf in abstract.items():
        stack, name = split_path(path)
        row = rows[name]
        if stack is None:
            found[row.hf] = Place(path, None, None, row.change, _hf_shape(row, leaf.shape))
            continue
        first, shape = sum(stacks[:stack]), _hf_shape(row, leaf.shape[1:])
        for index in range(stacks[stack]):
            layer = first + index
            found[row.hf.format(layer)] = Place(path, index, layer, row.change, shape)
    return found


def split_path(path: str) -> tuple[int | None, str]:
    """`layers.2.attn.q_proj.kernel` -> (2, `layers.attn.q_proj.kernel`); (None, path) elsewhere."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    return (int(match[1]), f"layers.{match[2]}") if match else (None, path)


def _hf_shape(row: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    return row.change.to_hf(np.broadcast_to(np.uint8(0), shape)).shape


# ---- load


def load_weights(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    stacks: Sequence[int],
    *,
    allow_nan: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, jax.Array]:
    """Fills base parameters from a checkpoint.

    Args:
        checkpoint: the source.
        weights: the family's table.
        abstract: our path -> shape, dtype and sharding of every parameter to fill.
        stacks: number of layers in each stack.
        allow_nan: accept NaN and infinity.
        progress: called with (tensors loaded, tensors in all) after each.

    Returns:
        Our path -> array with the dtype and sharding asked for.

    Raises:
        WeightError: tensors are missing, unexpected, mis-shaped, or (after reading) not finite;
            one error lists all of them.
    """
    targets = places(weights, abstract, stacks)
    _check_names(checkpoint, weights, targets)
    names = [name for name in checkpoint.tensors if name in targets]
    arrays: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for done, name in enumerate(names, 1):
        place = targets[name]
        array = place.change.to_ours(checkpoint.read(name))
        leaf = abstract[place.path]
        if array.dtype == np.float64:  # jax has no float64 by default
            array = array.astype(leaf.dtype)
        if place.index is None:
            arrays[place.path], finite[name] = _whole(array, leaf)
        elif leaf.shape[0] == 1:
            arrays[place.path], finite[name] = _whole(array[None], leaf)
        else:
            stack = arrays.pop(place.path, None)
            arrays[place.path], finite[name] = _layer(stack, array, place.index, leaf)
        # Without waiting, host copies of many tensors would pile up.
        jax.block_until_ready(arrays[place.path])
        progress(done, len(names))
    bad = [name for name, flag in finite.items() if not bool(flag)]
    if bad and not allow_nan:
        raise WeightError(
            f"{checkpoint.name}: {len(bad)} tensors hold NaN or infinity - use undamaged weights, "
            "or set model.allow_nan=true:" + listing(bad, limit=len(bad))
        )
    return arrays


def _check_names(
    checkpoint: Checkpoint, weights: Sequence[Weight], targets: Mapping[str, Place]
) -> None:
    problems = [f"missing: {name}" for name in targets if name not in checkpoint.tensors]
    for name, info in checkpoint.tensors.items():
        if name in targets:
            if info.shape != targets[name].shape:
                shapes = f"{list(info.shape)}, config.json asks for {list(targets[name].shape)}"
                problems.append(f"wrong shape: {name} is {shapes}")
        elif not _is_surplus(checkpoint, weights, name):
            problems.append(f"unexpected: {name}")
    if problems:
        raise WeightError(
            f"{checkpoint.name}: {len(problems)} tensors do not fit its config.json - use weights "
            "and config.json of the same model:" + listing(problems, limit=len(problems))
        )


def _is_surplus(checkpoint: Checkpoint, weights: Sequence[Weight], name: str) -> bool:
    """Whether a stored tensor says nothing: an old buffer, or the copy of a tied head."""
    heads = {row.hf for row in weights if row.ours == "lm_head.kernel"}
    tied = checkpoint.config.get("tie_word_embeddings", False)
    return bool(tied and name in heads or _HARMLESS.fullmatch(name))


def _whole(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> tuple[jax.Array, jax.Array]:
    value = to_device(array, leaf.sharding)
    if value.dtype != leaf.dtype:
        value = _cast(value, leaf.dtype)
    return value, _is_finite(value)


def _layer(
    stack: jax.Array | None, array: np.ndarray, index: int, leaf: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    if stack is None:
        stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*sharding.spec[1:])
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return _insert(leaf.sharding)(stack, to_device(array, sharding), index)


@functools.lru_cache
def _insert(sharding: Sharding | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def insert(stack: jax.Array, array: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
        array = array.astype(stack.dtype)
        stack = jax.lax.dynamic_update_index_in_dim(stack, array, index, 0)
        return stack, jnp.isfinite(array).all()

    return jax.jit(insert, donate_argnums=0, out_shardings=(sharding, None))


@functools.partial(jax.jit, static_argnums=1)
def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


# ---- save


def save_model(
    folder: Path,
    params: Mapping[str, Any],
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face model folder; it appears under its name only when complete.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        params: our path -> array. LoRA adapters among them are merged, in float32; base parameters
            that are not among them are copied from `checkpoint`, unrounded by any dtype in between.
        checkpoint: what was fine-tuned: its config, generation config and dtypes are taken over.
        weights: the family's table.
        stacks: number of layers in each stack.
        tokenizer: saved with the model.
        dtype: dtype of all tensors; None: that of each tensor in `checkpoint`.
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
        if name in targets or not _is_surplus(checkpoint, weights, name)
    }
    assert targets.keys() <= tensors.keys(), "params are not of this checkpoint"

    def read(name: str) -> np.ndarray:
        if name not in targets:
            return _narrow(name, checkpoint.read(name), tensors[name].dtype)
        place = targets[name]
        array = _merged(params, place, checkpoint, name)
        return place.change.to_hf(_narrow(name, array, tensors[name].dtype))

    note = {"kind": "model", "base": checkpoint.name, **(record or {})}
    with replace_folder(folder, note, source=checkpoint.root) as temporary:
        write_folder(temporary, tensors, read, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if checkpoint.generation_config is not None:
            write_json(temporary / "generation_config.json", checkpoint.generation_config)
        write_json(temporary / "config.json", _config(checkpoint, dtype))


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
        return np.asarray(params[path] if place.index is None else params[path][place.index])

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
