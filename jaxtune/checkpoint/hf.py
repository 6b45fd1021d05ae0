"""Applies a family's WEIGHTS table: Hugging Face tensors -> our flat parameters.

Names and shapes are checked in full before a byte is read. Then tensors stream one at a time from
the file into device arrays of any sharding: a stack of layers is allocated once on the devices and
filled in place, so host memory above the final arrays stays below twice the largest tensor.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import quant
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.distributed import to_device
from jaxtune.errors import WeightError, listing
from jaxtune.models.base import Change, Weight
from jaxtune.quant import QArray

# Buffers that old versions of transformers saved; they follow from the config.
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


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


def load_weights(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    abstract: Mapping[str, Any],
    stacks: Sequence[int],
    *,
    allow_nan: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Fills base parameters from a checkpoint.

    Args:
        checkpoint: the source.
        weights: the family's table.
        abstract: our path -> shape, dtype and sharding of every parameter to fill, or for kernels
            that are to be quantized a `QArray` of them. One dense tensor at a time is on the
            devices; of weights that the files hold quantized, none.
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
    arrays: dict[str, Any] = {}
    finite: dict[str, jax.Array] = {}
    for done, name in enumerate(names, 1):
        place = targets[name]
        leaf = abstract[place.path]
        value, finite[name] = _read_layer(checkpoint, name, place, leaf)
        if place.index is None or leaf.shape[0] == 1:
            arrays[place.path] = value
        else:
            stack = arrays.pop(place.path, None)
            arrays[place.path] = _insert(_described(leaf))(stack, value, place.index)
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
        elif not is_surplus(checkpoint, weights, name):
            problems.append(f"unexpected: {name}")
    if problems:
        raise WeightError(
            f"{checkpoint.name}: {len(problems)} tensors do not fit its config.json - use weights "
            "and config.json of the same model:" + listing(problems, limit=len(problems))
        )


def is_surplus(checkpoint: Checkpoint, weights: Sequence[Weight], name: str) -> bool:
    """Whether a stored tensor says nothing: an old buffer, or the copy of a tied head."""
    heads = {row.hf for row in weights if row.ours == "lm_head.kernel"}
    tied = checkpoint.config.get("tie_word_embeddings", False)
    return bool(tied and name in heads or _HARMLESS.fullmatch(name))


def _read_layer(
    checkpoint: Checkpoint, name: str, place: Place, leaf: Any
) -> tuple[Any, jax.Array]:
    """One tensor on the devices, in the dtype or format of `leaf`, and whether it is finite.

    A tensor of a stack comes without the layer axis, but with one of a single layer has it.
    """
    stacked = place.index is not None
    part = leaf if not stacked or leaf.shape[0] == 1 else jax.tree.map(_without_layers, leaf)
    if name in checkpoint.quantized:
        assert checkpoint.read_quantized is not None
        host = jax.tree.map(
            lambda array, like: to_device(array.reshape(like.shape), like.sharding),
            checkpoint.read_quantized(name),
            part,
        )
        return host, jnp.isfinite(quant.decode_scale(host.scale, host.shape)).all()
    array = place.change.to_ours(checkpoint.read(name))
    if array.dtype == np.float64:  # jax has no float64 by default
        array = array.astype(np.float32)
    if isinstance(leaf, QArray):
        dense = to_device(array.reshape(part.shape), part.codes.sharding)
        return _quantize(_described(part))(dense), _is_finite(dense)
    value = to_device(array.reshape(part.shape), part.sharding)
    if value.dtype != leaf.dtype and part is leaf:  # a stack casts what it is given
        value = _cast(value, leaf.dtype)
    return value, _is_finite(value)


def _without_layers(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*sharding.spec[1:])
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _described(leaf: Any) -> tuple:
    """An array's or quantized kernel's shapes and shardings in a form that can be a cache key."""
    leaves, structure = jax.tree.flatten(leaf)
    return structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)


@functools.lru_cache
def _insert(described: tuple) -> Callable[[Any, Any, int], Any]:
    structure, leaves = described
    shardings = structure.unflatten([sharding for _, _, sharding in leaves])

    def insert(stack: Any, value: Any, index: int) -> Any:
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_index_in_dim(
                old, new.astype(old.dtype), index, 0
            ),
            stack,
            value,
        )

    jitted = jax.jit(insert, donate_argnums=0, out_shardings=shardings)

    def insert_or_begin(stack: Any, value: Any, index: int) -> Any:
        if stack is None:
            zeros = [jnp.zeros(shape, dtype, device=where) for shape, dtype, where in leaves]
            stack = structure.unflatten(zeros)
        return jitted(stack, value, index)

    return insert_or_begin


@functools.lru_cache
def _quantize(described: tuple) -> Callable[[jax.Array], QArray]:
    structure, leaves = described
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in leaves]
    like = structure.unflatten(shapes)
    shardings = structure.unflatten([sharding for _, _, sharding in leaves])
    return jax.jit(functools.partial(quant.quantize_like, like), out_shardings=shardings)


@functools.partial(jax.jit, static_argnums=1)
def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def quantized_kernels(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    abstract: Mapping[str, Any],
    stacks: Sequence[int],
) -> dict[str, QArray]:
    """The kernels that the checkpoint's files hold quantized, by our path, with their layer axes.

    Raises:
        WeightError: layers of one stack are kept differently.
    """
    found: dict[str, list[QArray | None]] = {}
    for name, place in places(weights, abstract, stacks).items():
        found.setdefault(place.path, []).append(checkpoint.quantized.get(name))
    kernels = {}
    for path, layers in found.items():
        if any(layer != layers[0] for layer in layers):
            raise WeightError(
                f"{checkpoint.name}: layers of {path} are quantized differently, but they are "
                "stacked in one array - set model.layers=unroll"
            )
        if layers[0] is not None:
            lead = abstract[path].shape[:-2]
            kernels[path] = jax.tree.map(
                lambda leaf, lead=lead: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype),
                layers[0],
            )
    return kernels
