"""LLaMA Pro (Wu et al. 2024, arXiv 2401.02415): new layers between the old ones train, no others.

The L layers are cut into N groups. After each group comes a copy of its last layer whose matrices
that write to the residual (o_proj, down_proj, and their biases) are zero, so that it adds nothing
at first. `checkpoint/expand.py` makes the deeper checkpoint.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtune.errors import ConfigError
from jaxtune.nn.linear import layer_names


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many layers are added."""

    new_layers: int


READS = (Config,)


def origins(num_layers: int, config: Config) -> tuple[tuple[int, bool], ...]:
    """Of each layer of the deeper model: the base's layer, and whether it is the zeroed copy.

    Raises:
        ConfigError: the groups would not be equal.
    """
    if num_layers % config.new_layers:
        raise ConfigError(
            f"config.peft.new_layers={config.new_layers} does not divide the model's {num_layers} "
            "layers into equal groups - choose a number that does"
        )
    size = num_layers // config.new_layers
    found = []
    for layer in range(num_layers):
        found.append((layer, False))
        if (layer + 1) % size == 0:
            found.append((layer, True))
    return tuple(found)


def segments(num_layers: int, config: Config) -> tuple[int, ...]:
    """Groups of old layers, each with its new one behind it, of the deeper model."""
    return (num_layers // config.new_layers - 1, 1) * config.new_layers


def trained(names: Iterable[str], config: Config, stacks: Sequence[int]) -> set[str]:
    """Every parameter of the new layers."""
    stride = sum(stacks) // config.new_layers

    def is_new(name: str) -> bool:
        (index, _), *_ = layer_names(name, tuple(stacks))
        return index is not None and (index + 1) % stride == 0

    return {name for name in names if is_new(name)}
