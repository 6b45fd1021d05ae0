"""Freeze tuning: the last or first layers train as they are, the others stay.

The model is cut into two stacks at the border, so gradients stop at the first trained layer: what
is below is neither differentiated nor saved. Options are those of LLaMA-Factory (`freeze_trainable_
layers`, `freeze_trainable_modules`, `freeze_extra_modules`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.nn.linear import layer_names


@dataclass(frozen=True, kw_only=True)
class Config:
    """The last (positive) or first (negative) layers, parts of them, and what else trains."""

    trainable_layers: int
    trainable_modules: tuple[str, ...]
    extra_modules: tuple[str, ...]


READS = (Config,)


def segments(num_layers: int, config: Config) -> tuple[int, ...]:
    """Layers on both sides of the border; ConfigError if the model has fewer than asked for."""
    count = config.trainable_layers
    if abs(count) > num_layers:
        raise ConfigError(
            f"config.peft.trainable_layers={count}: the model has {num_layers} layers"
        )
    first = num_layers - count if count >= 0 else -count
    return tuple(size for size in (first, num_layers - first) if size)


def trained(names: Iterable[str], config: Config, stacks: Sequence[int]) -> set[str]:
    """Parameters of the chosen layers' modules, and of the extra modules.

    Raises:
        ConfigError: a module that is not in the model, or none is left.
    """
    num_layers, count = sum(stacks), config.trainable_layers
    chosen = range(num_layers - count, num_layers) if count >= 0 else range(-count)
    parts: dict[str, list[str]] = {"trainable_modules": [], "extra_modules": []}
    found, used = set(), set()
    for name in names:
        (index, full), *_ = layer_names(name, tuple(stacks))
        if index is not None and index not in chosen:
            continue
        field = "extra_modules" if index is None else "trainable_modules"
        part = full if index is None else full.split(".", 2)[2]
        parts[field].append(part)
        for pattern in getattr(config, field):
            if (pattern == "all" and index is not None) or _is_in(part, pattern):
                found.add(name)
                used.add((field, pattern))
    asked = [("extra_modules", pattern) for pattern in config.extra_modules]
    asked += [("trainable_modules", p) for p in config.trainable_modules if count]
    for field, pattern in asked:
        if (field, pattern) not in used:
            modules = sorted({part.rpartition(".")[0] for part in parts[field]})
            raise ConfigError(
                f"config.peft.{field}: {pattern!r} matches none of {', '.join(modules)}"
            )
    if not found:
        raise ConfigError(
            "config.peft.method=freeze trains nothing - set peft.trainable_layers or extra_modules"
        )
    return found


def _is_in(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter or a module that it is part of."""
    words = name.split(".")
    return any(tree.matches(pattern, ".".join(words[:end])) for end in range(1, len(words) + 1))
