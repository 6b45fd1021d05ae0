"""Several LoRAs in one: what `jaxtune.merge` does with each layer.

`cat` and `svd` add the products s w A B, exactly and in the best approximation of a rank. The
others work on A and B as PEFT 0.21.2 does (`add_weighted_adapter`): each is weighted with
sqrt(|w s|), the sign going to A, so the sum has cross products too, and keeps the rank. Of every A
and B

    linear       adds
    ties         keeps the `density` largest entries, then at each place adds those with the sign of
                 their sum, divided by how many there are (Yadav et al. 2023, arXiv 2306.01708)
    dare         keeps entries with probability `density`, divided by it, and adds (Yu et al. 2023,
                 arXiv 2311.03099)
    dare_ties    keeps as dare does, adds as ties does
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """A layer's LoRA as PEFT stores it: the change of its weight is w B A."""

    a: np.ndarray  # [R, D_in]
    b: np.ndarray  # [D_out, R]
    weight: float  # the adapter's own scale included


class Knobs(NamedTuple):
    """What combinations may need.

    Attributes:
        rank: of the result of svd.
        density: share of entries that ties and dare keep.
        random: source of dare's choices.
    """

    rank: int
    density: float
    random: np.random.Generator


def _cat(pairs: Sequence[Pair], knobs: Knobs) -> tuple[np.ndarray, np.ndarray]:
    del knobs
    a = np.concatenate([pair.weight * pair.a for pair in pairs])
    return a, np.concatenate([pair.b for pair in pairs], axis=1)


def _svd(pairs: Sequence[Pair], knobs: Knobs) -> tuple[np.ndarray, np.ndarray]:
    a, b = _cat(pairs, knobs)
    # Of B A, from the triangles of both: no D_out x D_in matrix is made.
    left, b_triangle = np.linalg.qr(b)
    right, a_triangle = np.linalg.qr(a.T)
    u, values, v = np.linalg.svd(b_triangle @ a_triangle.T)
    r = knobs.rank
    return v[:r] @ right.T, (left @ u[:, :r]) * values[:r]


def _largest(matrix: np.ndarray, knobs: Knobs) -> np.ndarray:
    count = int(knobs.density * matrix.size)
    kept = np.zeros(matrix.size, matrix.dtype)
    places = np.argsort(-np.abs(matrix), axis=None, kind="stable")[:count]
    kept[places] = matrix.reshape(-1)[places]
    return kept.reshape(matrix.shape)


def _some(matrix: np.ndarray, knobs: Knobs) -> np.ndarray:
    return matrix * (knobs.random.random(matrix.shape) < knobs.density) / knobs.density


def _all(matrix: np.ndarray, knobs: Knobs) -> np.ndarray:
    del knobs
    return matrix


def _added(matrices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.tensordot(weights, matrices, 1)


def _elected(matrices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of those entries that have the sign of their sum, weighted."""
    sign = np.where(matrices.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(matrices) == sign
    return np.tensordot(weights, matrices * agree, 1) / np.maximum(agree.sum(axis=0), 1)


def _by_matrix(keep: Callable, join: Callable) -> Callable:
    def combine(pairs: Sequence[Pair], knobs: Knobs) -> tuple[np.ndarray, np.ndarray]:
        weights = np.array([pair.weight for pair in pairs])
        roots = np.sqrt(np.abs(weights))
        a = join(np.stack([keep(pair.a, knobs) for pair in pairs]), np.sign(weights) * roots)
        return a, join(np.stack([keep(pair.b, knobs) for pair in pairs]), roots)

    return combine


# (pairs of one layer, knobs) -> A and B of the result, whose scale is 1.
COMBINATIONS = MappingProxyType(
    {
        "cat": _cat,
        "svd": _svd,
        "linear": _by_matrix(_all, _added),
        "ties": _by_matrix(_largest, _elected),
        "dare": _by_matrix(_some, _added),
        "dare_ties": _by_matrix(_some, _elected),
    }
)
