"""Token embedding; tied heads use its table too."""

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

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]. Ids must be below V: JAX clamps them silently."""
        return self.table.get_value()[tokens].astype(self.compute_dtype)
