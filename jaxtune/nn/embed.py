"""Token embedding with slots for an adapter, noise, virtual tokens; tied heads use its table."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.nn.params import Policy


class Embed(nnx.Module):
    """Rows of a table [V, D].

    The slot `adapter` holds None or a module that is called with the ids and the layer itself and
    returns what the ids become; its `matrix` makes of the table what a tied head multiplies with.
    The slot `prompt` holds None or a module that gives P virtual tokens [P, D]: they are what the
    first P positions of every example hold, whatever ids stand there.
    """

    def __init__(self, vocab_size: int, width: int, *, policy: Policy, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.compute_dtype: DTypeLike = policy.compute_dtype
        self.table = nnx.Param(
            normal(rngs.params(), (vocab_size, width), policy.param_dtype), axes=("vocab", "embed")
        )
        self.adapter: Any = nnx.data(None)
        self.noise: Any = nnx.data(None)
        self.prompt: Any = nnx.data(None)

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Rows of the table in the compute dtype: [..., T] -> [..., T, D]."""
        return self.table.get_value()[tokens].astype(self.compute_dtype)

    def with_prompt(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] with the virtual tokens at the first positions [B, T], if any."""
        if self.prompt is None:
            return x
        virtual = self.prompt().astype(x.dtype).at[positions].get(mode="fill", fill_value=0)
        return jnp.where((positions < self.prompt.length)[..., None], virtual, x)

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """int32 [B, T] -> [B, T, D]. Ids must be below V: JAX clamps them silently."""
        x = self.rows(tokens) if self.adapter is None else self.adapter(tokens, self)
        return x if self.noise is None else self.noise(x, segment_ids)
