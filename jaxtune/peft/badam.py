"""BAdam (Luo et al. 2024, arXiv 2404.02827): blocks of layers train in turn, from the first on.

What is outside the layers stays as it is. The optimizer begins anew with each block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Config:
    """Layers of a block, and optimizer steps after which the next one trains."""

    active_layers: int
    switch_steps: int


READS = (Config,)


def trained(names: Iterable[str], config: Config, stacks: Sequence[int]) -> set[str]:
    """The parameters of all layers, some at a time."""
    del config, stacks
    return {name for name in names if name.startswith("layers.")}


def active(turn: jax.Array, num_layers: int, config: Config, seed: int) -> jax.Array:
    """Layers of a turn: int32 [K]; the last block is filled up with the first layers."""
    del seed
    blocks = -(-num_layers // config.active_layers)
    first = turn % blocks * config.active_layers
    return (first + jnp.arange(config.active_layers)) % num_layers
