"""NEFTune (Jain et al. 2023, arXiv 2310.05914): noise on embeddings while training.

    x + U(-1, 1) alpha / sqrt(L D)

L is the length of the token's own example, also where several are packed into a row or a row is
padded (transformers 5.23 takes the length of the padded row).
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.nn.params import SeedKey

_PLACE = zlib.crc32(b"embed.noise")  # sets the noise's key apart from those of adapters


class Noise(nnx.Module):
    """The slot's content: noise if there is a key, which only the train step gives."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.key: Any = nnx.data(None)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x [B, T, D] with noise added.

        Args:
            x: embeddings.
            segment_ids: int32 [B, T], the number of each token's example; None: rows are examples.
        """
        if self.key is None:
            return x
        _, length, width = x.shape
        lengths: Any = length
        if segment_ids is not None:
            lengths = _example_lengths(segment_ids)[..., None]
        bound = self.alpha / jnp.sqrt(lengths * jnp.float32(width))
        noise = jax.random.uniform(self.key.get_value(), x.shape, minval=-1.0, maxval=1.0)
        return x + (bound * noise).astype(x.dtype)


def seed(model: Any, key: jax.Array) -> None:
    """Gives the embedding's noise, if it has any, its key for one forward pass."""
    if model.embed.noise is not None:
        model.embed.noise.key = SeedKey(jax.random.fold_in(key, _PLACE))


def _example_lengths(segment_ids: jax.Array) -> jax.Array:
    """Tokens of each token's example: int32 [B, T], of ids that are at most T."""
    size = segment_ids.shape[1] + 1
    return jax.vmap(lambda ids: jnp.bincount(ids, length=size)[ids])(segment_ids)
