"""Relative positions as T5 learns them: a number for each head and bucket of distances.

Raffel et al. 2019 (arXiv 1910.10683), section 2.1; buckets as in transformers' T5Attention. The
layers of a stack share the numbers.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.nn.params import Policy


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How distances are put together.

    Half of the buckets are for one distance each, from 0; the others grow with its logarithm, and
    the last one takes all that is further away.

    Attributes:
        count: of the buckets.
        furthest: the distance at which the last one begins, about.
        both_ways: keys behind the query have the second half of the buckets; otherwise they are
            in the bucket of distance 0.
    """

    count: int
    furthest: int
    both_ways: bool

    def of(self, distances: np.ndarray) -> np.ndarray:
        """The bucket of each distance, position of the key less that of the query: int32."""
        count, first = self.count, 0
        away = np.maximum(-distances, 0)
        if self.both_ways:
            count //= 2
            away, first = np.abs(distances), count * (distances > 0)
        exact = count // 2
        # In float32, as there: rounding decides on which side of a border a distance is.
        ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
        steps = ratio / np.float32(math.log(self.furthest / exact)) * np.float32(count - exact)
        far = np.minimum(exact + steps.astype(np.int32), count - 1)
        return (first + np.where(away < exact, away, far)).astype(np.int32)


class RelativeBias(nnx.Module):
    """What attention scores get for the distance of query and key."""

    def __init__(self, num_heads: int, buckets: Buckets, *, policy: Policy):
        self.buckets = buckets
        zeros = jnp.zeros((buckets.count, num_heads), policy.param_dtype)
        self.table = nnx.Param(zeros, axes=("buckets", None))

    def __call__(self, length: int) -> jax.Array:
        """float32 [N, 2M - 1] for rows of M tokens, as `ops.attention.Extras.relative`."""
        rows = self.table.get_value()[self.buckets.of(np.arange(1 - length, length))]
        return rows.T.astype(jnp.float32)
