"""What a model family provides: a module with these names.

Config     frozen dataclass with `from_hf(dict) -> Config`, from Hugging Face's config.json
weights    weights(config) -> tuple of `Weight` rows: our parameter path, Hugging Face's tensor
           name, the change; rows of parameters that the config leaves out do no harm
TINY       config.json of a model small enough for tests (`model.path=tiny:<family>`)
SIZES      name of a published size -> its config.json, for plans without files
PREFIX     what tensor names begin with that files may leave out (only where they do)
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
    """One row of a family's weight table.

    Attributes:
        ours: parameter path.
        hf: Hugging Face's name; several rows may share a tensor, each with its columns of it.
        change: between the two layouts.
        columns: of the last axis of the tensor in our layout, those that are this parameter, in its
            order; None: all.
        experts: in how many tensors, each of one expert, the parameter of a layer lies; their name
            has a second `{}`. 0: in one.
        first: the layer that Hugging Face numbers 0, of a decoder behind an encoder.
    """

    ours: str
    hf: str
    change: Change
    columns: np.ndarray | None = None
    experts: int = 0
    first: int = 0

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face's names of the tensors that hold the parameter of a layer."""
        number = None if layer is None else layer - self.first
        if self.experts:
            return [self.hf.format(number, expert) for expert in range(self.experts)]
        return [self.hf.format(number)]

    def take(self, array: np.ndarray) -> np.ndarray:
        """Our parameter of one layer, from Hugging Face's tensor."""
        whole = self.change.to_ours(array)
        return whole if self.columns is None else whole[..., self.columns]
