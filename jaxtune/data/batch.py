"""The records that travel from data files to the training step."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np


class TokenRow(NamedTuple):
    """One tokenized example.

    Attributes:
        tokens: int32 [T], the ids that the model reads.
        trained: bool [T], whether token t is a target of the loss; `trained[0]` is False.
    """

    tokens: np.ndarray
    trained: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of one or more examples; all arrays [B, T], or [A, B, T] for a step of A micro-batches.

    Attributes:
        tokens: int32 ids; padding is any valid id.
        positions: int32 position of each token in its own example (they restart when packed).
        segment_ids: int32 number of the example within its row, from 1; 0 is padding.
        weights: float32 weight of token t as a *target* (0: not trained); the first token of an
            example always has weight 0. Not shifted: the objective pairs output t-1 with token t.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
