"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases train, and nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """BitFit has no knobs."""


READS = (Config,)


def trained(names: Iterable[str], config: Config, stacks: Sequence[int]) -> set[str]:
    """All biases; ConfigError if the model has none."""
    del config, stacks
    biases = {name for name in names if name.endswith(".bias")}
    if not biases:
        raise ConfigError(
            "config.peft.method=bitfit: the model has no biases - use another method, e.g. lora"
        )
    return biases
