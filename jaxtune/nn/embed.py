"""Token embedding with a slot for noise; tied heads use its table too."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.nn.params import Policy


class Embed(nnx.Module):
    """Rows of a table [V, D]."""

    def __init__(self, vocab_size: int, width: int, *, policy: Policy, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.compute_dtype: DTypeLike = policy.compute_dtype
        self.table = nnx.Param(
            normal(rngs.params(), (vocab_size, width), policy.param_dtype), axes=("vocab", "embed")
        )
        self.noise: Any = nnx.data(None)

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """int32 [B, T] -> [B, T, D]. Ids must be below V: JAX clamps them silently."""
        x = self.table.get_value()[tokens].astype(self.compute_dtype)
        return x if self.noise is None else self.noise(x, segment_ids)
