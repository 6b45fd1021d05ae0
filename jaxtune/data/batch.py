"""The records that travel from data files to the training step."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np


class TokenRow(NamedTuple):
    """One tokenized example.

    Attributes:
        tokens: int32 [T], the ids that the model reads.
        trained: bool [T], whether token t is a target of the loss, or has a label; `trained[0]` is
            False but for labels.
        types: uint8 [T], which text of a pair token t belongs to; None: there are no labels.
        labels: float32 [M, C], of each of the M tokens that have one (its class; or a number for
            each output of the head); None: there are none.
    """

    tokens: np.ndarray
    trained: np.ndarray
    types: np.ndarray | None = None
    labels: np.ndarray | None = None


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
            With labels: the weight of the label of token t, and output t is paired with it.
        types: int32, which text of a pair a token belongs to; None: there are no labels.
        labels: float32 [C, B, T], or [A, C, B, T], of tokens whose weight is not 0 (see
            `TokenRow`); None: there are none.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    types: jax.Array | np.ndarray | None = None
    labels: jax.Array | np.ndarray | None = None

    @property
    def size(self) -> int:
        """Places for tokens, padding included."""
        return self.tokens.size

    @property
    def num_tokens(self) -> jax.Array | np.ndarray:
        """Tokens that are not padding, a scalar."""
        return (self.segment_ids > 0).sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PairBatch:
    """Rows of one source and one target each; arrays [B, S] and [B, T], or behind an axis A.

    Attributes:
        source: int32 ids of the sources; padding is any valid id.
        source_segments: int32, 1; 0 is padding.
        tokens: int32 ids of the targets, each with the EOS that ends it.
        segment_ids: int32, 1; 0 is padding.
        weights: float32 weight of each token of a target. The objective shifts what the model
            reads, so that output t is paired with token t.
    """

    source: jax.Array | np.ndarray
    source_segments: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray

    @property
    def size(self) -> int:
        """Places for tokens, padding included."""
        return self.source.size + self.tokens.size

    @property
    def num_tokens(self) -> jax.Array | np.ndarray:
        """Tokens of sources and targets that are not padding, a scalar."""
        return (self.source_segments > 0).sum() + (self.segment_ids > 0).sum()


Batch = TokenBatch | PairBatch
