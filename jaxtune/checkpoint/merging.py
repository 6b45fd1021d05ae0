"""A checkpoint with an adapter merged into its weights, and a merged one without it again.

What an adapter adds to a weight does not depend on the weight for most methods, so it can be taken
away; (IA)3 multiplies, so its factors are divided by. The merged weights were rounded when they
were stored, and are rounded once more, so each entry is within

    u (|merged| + |base|)        u: half the distance from 1 to the next number of the dtype

of the base's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint.adapted import changed, own, require_mergeable, with_adapter
from jaxtune.checkpoint.adapter import Adapter, load_adapter
from jaxtune.checkpoint.adapter_config import read_config
from jaxtune.checkpoint.hf import Place, joined, places
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.checkpoint.vocabulary import untied
from jaxtune.errors import ConfigError, WeightError
from jaxtune.log import warn
from jaxtune.models.base import Weight
from jaxtune.nn.params import Policy
from jaxtune.nn.stack import stack_sizes
from jaxtune.peft import Adapters
from jaxtune.peft.base import EMBEDDING
from jaxtune.peft.split import AGAIN

# Methods that add to weights what does not depend on them, and that multiply.
ADDITIVE = ("lora", "moslora", "mora", "loha", "lokr", "vera")
FACTORS = ("ia3",)


def merged(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A base with an adapter merged into it, in float32, then in the dtypes of its tensors.

    Args:
        checkpoint: the base, dense.
        folder: a PEFT folder for it.

    Raises:
        ConfigError: the base is quantized, or the adapter cannot be merged.
        WeightError: the adapter does not fit the base.
    """
    _require_dense(checkpoint, "merge into the dense model")
    adapter, weights, stacks, shapes = _opened(checkpoint, folder)
    require_mergeable(adapter.adapters, shapes)
    for warning in adapter.warnings:
        warn(warning)
    tied = models.read_config(checkpoint.config, checkpoint.name)[1].tie_embeddings
    if EMBEDDING in adapter.adapters.choice and tied:
        checkpoint = untied(checkpoint, weights)
    params, adapters = adapter.params, adapter.adapters
    targets = places(weights, changed(params, adapters, checkpoint, weights, stacks), stacks)

    def one(place: Place, stored: Callable[[], np.ndarray]) -> np.ndarray:
        return with_adapter(params, adapters, place, own(params, place, stored))

    read = _reading(checkpoint, targets, one)
    return dataclasses.replace(checkpoint, name=f"{checkpoint.name} + {folder}", read=read)


def unmerged(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The base of a merged model.

    Args:
        checkpoint: the merged model, dense.
        folder: the adapter that was merged into it, a PEFT folder.

    Raises:
        ConfigError: the adapter's method replaces weights, or turns or scales them by what they
            were, or it started as a part of them; or the model is quantized.
        WeightError: the adapter does not fit the model.
    """
    _require_dense(checkpoint, "unmerge a dense export")
    start = read_config(folder)[1].get("init_lora_weights")
    if start in AGAIN:
        raise ConfigError(
            f"{folder} started as a part of weights that the merged model has no more "
            f"(init_lora_weights={start}) - keep the base"
        )
    adapter, weights, stacks, shapes = _opened(checkpoint, folder)
    _require_invertible(adapter.adapters, folder)
    names = {f"{path}.{x}" for path in adapter.adapters.choice for x in ("kernel", "table", "bias")}
    chosen = {name: shapes[name] for name in names & shapes.keys()}
    targets = places(weights, chosen, stacks)

    def one(place: Place, stored: Callable[[], np.ndarray]) -> np.ndarray:
        return _without(adapter, place, place.row.take(stored()).astype(np.float32))

    return dataclasses.replace(checkpoint, read=_reading(checkpoint, targets, one))


def _require_dense(checkpoint: Checkpoint, remedy: str) -> None:
    if checkpoint.quantized:
        raise ConfigError(
            f"{checkpoint.name} is quantized, and its weights would be rounded again - {remedy}"
        )


def _opened(
    checkpoint: Checkpoint, folder: Path
) -> tuple[Adapter, Sequence[Weight], tuple[int, ...], dict[str, Any]]:
    """The adapter, and its model's table, stacks (of one layer) and shapes."""
    family, config = models.read_config(checkpoint.config, checkpoint.name)
    weights, policy = family.weights(config), Policy(layers="unroll")
    stacks = stack_sizes(config.num_layers, policy, config.layer_kinds)
    shapes = tree.describe(lambda: family.build(config, policy, nnx.Rngs(0))).abstract()
    return load_adapter(folder, shapes, weights, stacks, base=checkpoint), weights, stacks, shapes


def _reading(
    checkpoint: Checkpoint,
    targets: Mapping[str, Sequence[Place]],
    one: Callable[[Place, Callable[[], np.ndarray]], np.ndarray],
) -> Callable[[str], np.ndarray]:
    """Reads a checkpoint's tensors, of which `one` makes the places of `targets` anew."""

    def read(name: str) -> np.ndarray:
        stored = functools.cache(functools.partial(checkpoint.read, name))
        if name not in targets:
            return stored()
        arrays = [one(place, stored).astype(np.float32) for place in targets[name]]
        return joined(targets[name], arrays, stored).astype(checkpoint.tensors[name].dtype)

    return read


def _require_invertible(adapters: Adapters, folder: Path) -> None:
    if adapters.method not in ADDITIVE + FACTORS:
        raise ConfigError(
            f"{folder} holds a {adapters.method} adapter, from which the weights that it was "
            "merged into cannot be told - keep the base"
        )
    if replaced := sorted([*adapters.saved, *adapters.biases, *adapters.rows]):
        raise ConfigError(
            f"{folder} replaces {', '.join(replaced)}, of which the merged model has nothing left "
            "- keep the base"
        )


def _without(adapter: Adapter, place: Place, array: np.ndarray) -> np.ndarray:
    """One layer's array, float32, without what was merged into it."""
    merge = functools.partial(with_adapter, adapter.params, adapter.adapters, place)
    if adapter.adapters.method not in FACTORS:
        return array - merge(np.zeros_like(array))
    factors = merge(np.ones_like(array))
    if not factors.all():
        raise WeightError(f"{place.path} was multiplied with zeros - keep the base")
    return array / factors


def distances(found: Checkpoint, base: Checkpoint) -> dict[str, float]:
    """Relative difference (Frobenius) of each tensor of a model from that of another.

    Raises:
        WeightError: the other model lacks one of them, or has another shape.
    """
    result = {}
    for name, info in found.tensors.items():
        if name not in base.tensors or base.tensors[name].shape != info.shape:
            raise WeightError(f"{base.name} has no {name} of shape {list(info.shape)}")
        first, second = (of.read(name).astype(np.float32) for of in (found, base))
        result[name] = float(np.linalg.norm(first - second) / (np.linalg.norm(second) or 1))
    return result
