"""LISA (Pan et al. 2024, arXiv 2403.17919): a few layers, drawn anew every so many steps, train.

What is outside the layers (embedding, last norm, head) always trains. As in BAdam the optimizer
begins anew with each turn, so that it keeps nothing of layers that rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Config:
    """Layers that train at a time, and optimizer steps after which others do."""

    active_layers: int
    switch_steps: int


READS = (Config,)


def trained(names: Iterable[str], config: Config, stacks: Sequence[int]) -> set[str]:
    """All parameters; of the layers, some at a time."""
    del config, stacks
    return set(names)


def active(turn: jax.Array, num_layers: int, config: Config, seed: int) -> jax.Array:
    """Layers of a turn, drawn without replacement: int32 [K]."""
    key = jax.random.fold_in(jax.random.key(seed), turn)
    return jax.random.permutation(key, jnp.arange(num_layers))[: config.active_layers]
