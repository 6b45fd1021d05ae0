"""Which layers get an adapter, and the table of methods.

A method is a module with `Config` (its knobs), `attach` (a linear layer and its chosen layers ->
the adapter for the slot) and `initial` (name and shape of a variable -> its first value, one
layer).
"""

import difflib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.nn.linear import layer_names, linears
from jaxtune.peft import lora

METHODS = MappingProxyType({"lora": lora})

# Linear path ("layers.0.attn.q_proj") -> for each layer of its stack, whether it is adapted.
Choice = Mapping[str, tuple[bool, ...]]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Names, patterns or "all-linear"; patterns taken out; indices of layers (empty: all)."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()


def choose(model: Any, targets: Targets) -> Choice:
    """Finds the targeted layers.

    A layer is matched by its name with its index in the whole model (`layers.3.attn.q_proj`),
    however the model is cut into stacks; the output head is a target only by name.

    Raises:
        ConfigError: a pattern or a layer index that matches nothing, with the candidates.
    """
    unused = set(targets.include)
    absent = [i for i in targets.layers if not 0 <= i < sum(model.stacks)]
    if absent:
        raise ConfigError(
            f"config.peft.layers_to_transform: no layer {absent[0]} - "
            f"the model has layers 0 to {sum(model.stacks) - 1}"
        )
    choice, seen = {}, set()
    for path, _ in linears(model):
        chosen = []
        for index, name in layer_names(path, model.stacks):
            seen.add(name.rsplit(".", 1)[-1])
            hits = {pattern for pattern in targets.include if _hits(pattern, name)}
            unused -= hits
            excluded = any(tree.matches(pattern, name) for pattern in targets.exclude)
            wanted = not targets.layers or index in targets.layers
            chosen.append(bool(hits) and not excluded and wanted)
        if any(chosen):
            choice[path] = tuple(chosen)
    if unused or not choice:
        raise ConfigError(_no_match(sorted(unused) or targets.include, sorted(seen)))
    return choice


def _hits(pattern: str, name: str) -> bool:
    if pattern == "all-linear":
        return name != "lm_head"
    return tree.matches(pattern, name)


def _no_match(patterns: Any, names: list[str]) -> str:
    close = difflib.get_close_matches(patterns[0], names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"config.peft.target_modules={tuple(patterns)} matches no layer that is left - "
        f"layers are {', '.join(names)}, or all-linear{hint}"
    )


def attach(model: Any, method: str, config: Any, choice: Choice) -> None:
    """Fills the slots of the chosen layers (in place; for use under `tree.describe`)."""
    for path, linear in linears(model):
        if path in choice:
            linear.adapter = nnx.data(METHODS[method].attach(linear, config, choice[path]))


def initial_value(
    name: str,
    shape: tuple[int, ...],
    method: str,
    config: Any,
    choice: Choice,
    stacks: Any,
    seed: int,
) -> np.ndarray:
    """First value of an adapter's variable; the same for a layer in whatever stack it is.

    Args:
        name: path of the variable, `<linear>.adapter.<leaf>`.
        shape: [n, ...] for a layer in a stack of n.
        method: name of the method.
        config: the method's knobs.
        choice: the adapted layers.
        stacks: sizes of the model's stacks.
        seed: with the layer's name, the seed of the random numbers.
    """
    path, leaf = name.split(".adapter.")
    names = layer_names(path, stacks)
    stacked = names[0][0] is not None
    values = []
    for (_, layer), chosen in zip(names, choice[path], strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(layer.encode())])
        values.append(METHODS[method].initial(leaf, shape[stacked:], config, chosen, rng))
    return np.stack(values) if stacked else values[0]


def seed(model: nnx.Module, key: Any) -> None:
    """Puts a random key into every adapter that wants one (dropout), for one forward pass."""
    for i, (_, linear) in enumerate(linears(model)):
        if linear.adapter is not None:
            linear.adapter.seed(key, i)
