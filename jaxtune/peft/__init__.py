"""The table of methods, and what can be done with every one of them.

`peft.base` says what a method is made of.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from jaxtune.nn.linear import layer_names, linears
from jaxtune.peft import full, lora
from jaxtune.peft.base import Adapters
from jaxtune.peft.targets import Targets, choose

__all__ = [
    "METHODS",
    "Adapters",
    "Targets",
    "attach",
    "choose",
    "choose_adapters",
    "continued",
    "initial_value",
    "is_adapter",
    "layer_names",
    "linears",
    "seed",
    "trained",
    "unread",
]

METHODS: Mapping[str, Any] = MappingProxyType({"full": full, "lora": lora})

# Knobs that say nothing about what a trained adapter computes.
_OF_TRAINING = ("dropout",)


def is_adapter(method: str) -> bool:
    """Whether the method attaches something to the model."""
    return hasattr(METHODS[method], "attach")


def _options(section: Any, kind: type) -> Any:
    """A dataclass of `READS` with the values of config.peft."""
    return kind(**{field.name: getattr(section, field.name) for field in dataclasses.fields(kind)})


def unread(section: Any) -> list[str]:
    """What is wrong with options of config.peft that are set although nobody reads them."""
    read, why = {"method"}, f"peft.method={section.method} does not read it"
    if is_adapter(section.method):
        read |= {"adapter"}
    for kind in METHODS[section.method].READS:
        read |= {field.name for field in dataclasses.fields(kind)}
    if section.adapter is not None and is_adapter(section.method):
        read, why = read & {"method", "adapter", *_OF_TRAINING}, "peft.adapter brings its own"
    return [
        f"config.peft.{field.name}={getattr(section, field.name)!r} would be ignored: {why}"
        for field in dataclasses.fields(section)
        if field.name not in read and getattr(section, field.name) != field.default
    ]


def choose_adapters(model: Any, section: Any) -> Adapters:
    """What config.peft attaches to a model.

    Raises:
        ConfigError: targets or patterns that match nothing.
    """
    method = METHODS[section.method]
    config = _options(section, method.READS[0])
    chosen = choose(model, _options(section, Targets)) if Targets in method.READS else {}
    names = {path: layer_names(path, model.stacks) for path in chosen}
    choice = {
        path: tuple(
            method.for_layer(config, name) if flag else None
            for (_, name), flag in zip(names[path], flags, strict=True)
        )
        for path, flags in chosen.items()
    }
    return Adapters(section.method, config, choice)


def continued(adapters: Adapters, section: Any) -> Adapters:
    """Adapters read from a folder, with the knobs of config.peft that it does not bring."""
    given = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(adapters.config)
        if field.name in _OF_TRAINING
    }

    def changed(config: Any) -> Any:
        return None if config is None else dataclasses.replace(config, **given)

    choice = {path: tuple(map(changed, configs)) for path, configs in adapters.choice.items()}
    return Adapters(adapters.method, changed(adapters.config), choice)


def trained(names: Iterable[str], section: Any) -> set[str]:
    """The base's parameters, of those named, that config.peft lets train."""
    method = METHODS[section.method]
    return method.trained(names, _options(section, method.READS[0]))


def attach(model: Any, adapters: Adapters) -> None:
    """Fills the slots of a model (in place; for use under `tree.describe`)."""
    METHODS[adapters.method].attach(model, adapters.choice)


def initial_value(
    name: str, shape: tuple[int, ...], adapters: Adapters, stacks: Any, seed: int
) -> np.ndarray:
    """First value of an adapter's variable; the same for a layer in whatever stack it is.

    Args:
        name: path of the variable, `<linear>.adapter.<leaf>`.
        shape: [n, ...] for a layer in a stack of n.
        adapters: the method and the adapted layers.
        stacks: sizes of the model's stacks.
        seed: with the layer's name, the seed of the random numbers.
    """
    path, leaf = name.split(".adapter.")
    names = layer_names(path, stacks)
    stacked = names[0][0] is not None
    values = []
    for (_, layer), config in zip(names, adapters.choice[path], strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(layer.encode())])
        value = np.zeros(shape[stacked:], np.float32)
        if config is not None:
            value = METHODS[adapters.method].initial(leaf, value.shape, config, rng)
        values.append(value)
    return np.stack(values) if stacked else values[0]


def seed(model: nnx.Module, key: Any) -> None:
    """Puts a random key into every adapter that wants one (dropout), for one forward pass."""
    for i, (_, linear) in enumerate(linears(model)):
        if linear.adapter is not None:
            linear.adapter.seed(key, i)
