"""What a model family provides: a module with these names.

    Config     frozen dataclass with `from_hf(dict) -> Config`, from Hugging Face's config.json
    WEIGHTS    tuple of `Weight` rows: our parameter path, Hugging Face's tensor name, the change
    TINY       config.json of a model small enough for tests (`model.path=tiny:<family>`)
    build      build(config, policy, rngs) -> nnx.Module

A parameter path joins attribute names with dots, as `tree.flatten` gives them. Parameters of layers
live in stacks: `layers.<stack>.<rest>` has a leading axis over the layers of that stack. A row of
the table leaves out the stack's number: `layers.<rest>` with `{}` for the layer's index on the
other side.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Change(NamedTuple):
    """A pair of inverse functions on one layer's array: Hugging Face -> ours and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]


SAME = Change(lambda array: array, lambda array: array)
TRANSPOSE = Change(lambda array: array.T, lambda array: array.T)


class Weight(NamedTuple):
    """One row of a family's weight table."""

    ours: str
    hf: str
    change: Change
