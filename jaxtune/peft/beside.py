"""Parameters of the base that train beside an adapter: whole parts of the model, and biases.

What PEFT calls modules_to_save and bias. They are ordinary parameters under their own paths; the
adapter's folder holds them in full.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtune import tree
from jaxtune.errors import ConfigError, nearest
from jaxtune.nn.linear import layer_names
from jaxtune.peft.base import Choice


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Parts of the base, by name or pattern."""

    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which biases of the base: "none", "adapted" (those of adapted layers), or "all"."""

    bias: str = "none"


def choose_saved(
    names: Iterable[str], patterns: tuple[str, ...], choice: Choice, stacks: tuple[int, ...]
) -> frozenset[str]:
    """The parameters whose part of the model a pattern names, in all layers of their stack.

    Raises:
        ConfigError: a pattern matches nothing, an adapted layer, or some layers of a stack only.
    """
    found, unused, modules = set(), set(patterns), set()
    for name in names:
        path = name.rpartition(".")[0]
        flags = []
        for _, layer in layer_names(path, stacks):
            hits = {pattern for pattern in patterns if tree.matches(pattern, layer)}
            unused -= hits
            flags.append(bool(hits))
        modules.add(path.rpartition(".")[2])
        if any(flags) and path in choice:
            raise ConfigError(
                f"config.peft.modules_to_save: {path} is adapted - take it out of one of the two"
            )
        if _whole(name, flags, "modules_to_save"):
            found.add(name)
    if unused:
        absent = min(unused)
        raise ConfigError(
            f"config.peft.modules_to_save: {absent} is no part of the model - parts are "
            f"{', '.join(sorted(modules))}" + nearest(absent, modules)
        )
    return frozenset(found)


def choose_biases(
    names: Iterable[str], bias: str, choice: Choice, stacks: tuple[int, ...]
) -> frozenset[str]:
    """The biases that train.

    Raises:
        ConfigError: there are none, or some layers of a stack only are adapted.
    """
    found = set()
    for name in names if bias != "none" else ():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias":
            configs = choice.get(path, (None,) * len(layer_names(path, stacks)))
            flags = [bias == "all" or config is not None for config in configs]
            if _whole(name, flags, "bias"):
                found.add(name)
    if bias != "none" and not found:
        raise ConfigError(f"config.peft.bias={bias}: no such layer has a bias - leave it at none")
    return frozenset(found)


def _whole(name: str, flags: list[bool], option: str) -> bool:
    if any(flags) and not all(flags):
        raise ConfigError(
            f"config.peft.{option} takes some layers of {name}, but they are stacked in one array "
            "- set model.layers=unroll"
        )
    return all(flags)
