"""Applies a family's WEIGHTS table: Hugging Face tensors -> our flat parameters.

Names and shapes are checked in full before a byte is read. Then tensors stream one at a time from
the file into device arrays of any sharding: a stack of layers is allocated once on the devices and
filled in place, so host memory above the final arrays stays below twice the largest tensor.
"""

import functools
import re
from collections import Counter
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
from jaxtune.models import read_config
from jaxtune.models.base import Weight
from jaxtune.quant import QArray, take_columns

# Buffers and copies that old versions of transformers saved, and T5's one bias that nobody reads.
_HARMLESS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
    r"|embeddings\.(position_ids|token_type_ids)"
    r"|(encoder|decoder)\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight)"
)


class Place(NamedTuple):
    """Where a Hugging Face tensor, or a part of it, lives among our parameters."""

    path: str
    index: tuple[int, ...]  # (position in the stack), (position, expert); () outside the layers
    layer: int | None  # number of the layer in the model
    row: Weight
    shape: tuple[int, ...]  # of our parameter there
    of: int  # so many parameters share the tensor

    @property
    def position(self) -> int:
        """Which entry of the adapters' `Choice` has the layer's knobs."""
        return self.index[0] if self.index else 0


def places(
    weights: Sequence[Weight], abstract: Mapping[str, Any], stacks: Sequence[int]
) -> dict[str, tuple[Place, ...]]:
    """Hugging Face name -> places of its parts, for every tensor that fills `abstract`.

    Args:
        weights: the family's table.
        abstract: our path -> anything with `.shape`; base parameters only, no adapters.
        stacks: number of layers in each stack.
    """
    rows = {row.ours: row for row in weights}
    shared = Counter(row.hf for row in weights)
    found: dict[str, list[Place]] = {}
    for path, leaf in abstract.items():
        stack, name = split_path(path)
        row = rows[name]
        if stack is None:
            place = Place(path, (), None, row, leaf.shape, shared[row.hf])
            found.setdefault(row.hf, []).append(place)
            continue
        first = sum(stacks[:stack])
        for index in range(stacks[stack]):
            for expert, hf_name in enumerate(row.names(first + index)):
                at = (index, expert) if row.experts else (index,)
                shape = leaf.shape[len(at) :]
                place = Place(path, at, first + index, row, shape, shared[row.hf])
                found.setdefault(hf_name, []).append(place)
    return {name: tuple(parts) for name, parts in found.items()}


def stored_shape(parts: Sequence[Place]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor that has these parts, all of them."""
    *lead, _ = parts[0].shape
    shape = (*lead, sum(part.shape[-1] for part in parts))
    return parts[0].row.change.to_hf(np.broadcast_to(np.uint8(0), shape)).shape


def joined(
    parts: Sequence[Place], arrays: Sequence[np.ndarray], stored: Callable[[], np.ndarray]
) -> np.ndarray:
    """The Hugging Face tensor of our parameters of one layer.

    Args:
        parts: their places.
        arrays: their values.
        stored: the tensor, read if `parts` are not all of it.
    """
    change, columns = parts[0].row.change, [part.row.columns for part in parts]
    if columns[0] is None:  # then it is the only part
        return change.to_hf(arrays[0])
    width = sum(array.shape[-1] for array in arrays)
    if len(parts) == parts[0].of:
        whole = np.empty((*arrays[0].shape[:-1], width), arrays[0].dtype)
    else:
        whole = np.array(change.to_ours(stored()), arrays[0].dtype)
    for part, array in zip(columns, arrays, strict=True):
        whole[..., part] = array
    return change.to_hf(whole)


def split_path(path: str) -> tuple[int | None, str]:
    """`layers.2.attn.q_proj.kernel` -> (2, `layers.attn.q_proj.kernel`); (None, path) elsewhere."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    return (int(match[1]), f"layers.{match[2]}") if match else (None, path)


def load_weights(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    abstract: Mapping[str, Any],
    stacks: Sequence[int],
    *,
    allow_nan: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[Place, np.ndarray], np.ndarray] = lambda place, array: array,
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
        keep: what is kept of a dense parameter of one layer, on the host, before it is rounded or
            quantized.

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
    finite: list[tuple[str, jax.Array]] = []
    for done, name in enumerate(names, 1):
        stored = _read(checkpoint, name)
        for place in targets[name]:
            leaf = abstract[place.path]
            value, is_finite = _placed(stored, place, leaf, keep)
            finite.append((name, is_finite))
            if _is_whole(place, leaf):
                arrays[place.path] = value
            else:
                stack = arrays.pop(place.path, None)
                arrays[place.path] = _insert(_described(leaf))(stack, value, place.index)
            # Without waiting, host copies of many tensors would pile up.
            jax.block_until_ready(arrays[place.path])
        progress(done, len(names))
    bad = list(dict.fromkeys(name for name, flag in finite if not bool(flag)))
    if bad and not allow_nan:
        raise WeightError(
            f"{checkpoint.name}: {len(bad)} tensors hold NaN or infinity - use undamaged weights, "
            "or set model.allow_nan=true:" + listing(bad, limit=len(bad))
        )
    return arrays


def _check_names(
    checkpoint: Checkpoint, weights: Sequence[Weight], targets: Mapping[str, Sequence[Place]]
) -> None:
    problems = [f"missing: {name}" for name in targets if name not in checkpoint.tensors]
    for name, info in checkpoint.tensors.items():
        if name in targets:
            expected = stored_shape(targets[name])
            if info.shape != expected:
                shapes = f"{list(info.shape)}, config.json asks for {list(expected)}"
                problems.append(f"wrong shape: {name} is {shapes}")
        elif not is_surplus(checkpoint, weights, name):
            problems.append(f"unexpected: {name}")
    if problems:
        raise WeightError(
            f"{checkpoint.name}: {len(problems)} tensors do not fit its config.json - use weights "
            "and config.json of the same model:" + listing(problems, limit=len(problems))
        )


def is_surplus(checkpoint: Checkpoint, weights: Sequence[Weight], name: str) -> bool:
    """Whether a stored tensor says nothing here: an old buffer, the copy of a tied head, or a layer
    behind the last that predicts later tokens (DeepSeek-V3).
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    config = checkpoint.config
    if layer and config.get("num_nextn_predict_layers"):
        return int(layer[1]) >= config["num_hidden_layers"]
    if _HARMLESS.fullmatch(name):
        return True
    heads = {row.hf for row in weights if row.ours == "lm_head.kernel"}
    # The family knows what config.json does not say: many are tied unless it says otherwise.
    return name in heads and read_config(checkpoint.config, checkpoint.name)[1].tie_embeddings


def _read(checkpoint: Checkpoint, name: str) -> Any:
    """A tensor as Hugging Face has it, or a quantized kernel as we have it, on the host."""
    if name in checkpoint.quantized:
        assert checkpoint.read_quantized is not None
        return checkpoint.read_quantized(name)
    array = checkpoint.read(name)
    # jax has no float64 by default
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _placed(stored: Any, place: Place, leaf: Any, keep: Any) -> tuple[Any, jax.Array]:
    """A parameter on the devices, in the dtype or format of `leaf`, and whether it is finite.

    A part of a stack comes without the axes of layers and experts.
    """
    part = leaf
    if not _is_whole(place, leaf):
        part = jax.tree.map(functools.partial(_within, axes=len(place.index)), leaf)
    if isinstance(stored, QArray):
        host = jax.tree.map(
            lambda array, like: to_device(np.asarray(array).reshape(like.shape), like.sharding),
            take_columns(stored, place.row.columns),
            part,
        )
        return host, jnp.isfinite(quant.decode_scale(host.scale, host.shape)).all()
    array = keep(place, place.row.take(stored))
    if isinstance(leaf, QArray):
        dense = to_device(array.reshape(part.shape), part.codes.sharding)
        return _quantize(_described(part))(dense), _is_finite(dense)
    value = to_device(array.reshape(part.shape), part.sharding)
    if value.dtype != leaf.dtype and part is leaf:  # a stack casts what it is given
        value = _cast(value, leaf.dtype)
    return value, _is_finite(value)


def _is_whole(place: Place, leaf: Any) -> bool:
    """Whether a tensor is all of a parameter."""
    return all(size == 1 for size in leaf.shape[: len(place.index)])


def _within(leaf: jax.ShapeDtypeStruct, axes: int) -> jax.ShapeDtypeStruct:
    """An array without so many leading axes."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*sharding.spec[axes:])
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype, sharding=sharding)


def _described(leaf: Any) -> tuple:
    """An array's or quantized kernel's shapes and shardings in a form that can be a cache key."""
    leaves, structure = jax.tree.flatten(leaf)
    return structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)


@functools.lru_cache
def _insert(described: tuple) -> Callable[[Any, Any, tuple[int, ...]], Any]:
    structure, leaves = described
    shardings = structure.unflatten([sharding for _, _, sharding in leaves])

    def insert(stack: Any, value: Any, index: tuple[int, ...]) -> Any:
        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            part = new.astype(old.dtype)[(None,) * len(index)]
            return jax.lax.dynamic_update_slice(old, part, (*index, *(0,) * new.ndim))

        return jax.tree.map(put, stack, value)

    jitted = jax.jit(insert, donate_argnums=0, out_shardings=shardings)

    def insert_or_begin(stack: Any, value: Any, index: tuple[int, ...]) -> Any:
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
    for name, parts in places(weights, abstract, stacks).items():
        stored = checkpoint.quantized.get(name)
        for part in parts:
            take = functools.partial(take_columns, columns=part.row.columns)
            kernel = None if stored is None else jax.eval_shape(take, stored)
            found.setdefault(part.path, []).append(kernel)
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
