"""DoRA of the token embedding, and what it shares with DoRA of linear layers.

    e(id) = (m / n) * (E[id] + s A[id] B)        n = norms of the columns of E + s A B

A [V, R], B [R, D] and m [D]: a column is one feature of all tokens. They start as LoRA's on the
embedding and as the norms of E, so the model starts as the base; n is a constant for the gradient.
There is no dropout, and an output head that is tied to E keeps E.

Source: PEFT 0.21.2 (tuners/lora/dora.py, `DoraEmbeddingLayer`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import ops
from jaxtune.models.base import SAME
from jaxtune.nn.embed import Embed
from jaxtune.nn.params import AdapterConstant, AdapterParam
from jaxtune.peft import base, embedding
from jaxtune.peft.base import EMBEDDING, Tensor

FROM_KERNEL = ("magnitude", "norm")


class DoRAEmbedding(embedding.LoRAEmbedding):
    """The adapter of the embedding."""

    def __init__(self, embed: Embed, rank: int):
        super().__init__(embed, rank)
        width = embed.table.get_value().shape[-1]
        self.magnitude = AdapterParam(jnp.zeros((width,)), axes=("embed",))
        self.norm = AdapterConstant(jnp.zeros((width,)), axes=("embed",))

    def __call__(self, tokens: jax.Array, embed: Embed) -> jax.Array:
        a, b = jax.lax.stop_gradient((self.a.get_value(), self.b.get_value()))
        projected = ops.dot(a.T, embed.table.get_value(), jnp.float32)
        norm = norms(self.norm.get_value(), a, b * self.scale.get_value(), projected)
        x = super().__call__(tokens, embed)
        return (self.magnitude.get_value() / norm).astype(x.dtype) * x


def norms(of_base: jax.Array, a: jax.Array, b: jax.Array, projected: jax.Array) -> jax.Array:
    """Norms of the columns of W + a b, float32 [D_out], which is never made.

    Their squares are those of W, and 2 sum_r b * (a^T W) + sum_r b * ((a^T a) b): products with R
    rows only.

    Args:
        of_base: norms of the columns of W.
        a: [D_in, R].
        b: [R, D_out], scaled already.
        projected: a^T W [R, D_out].
    """
    cross = 2 * projected + (a.T @ a) @ b
    return jnp.sqrt(of_base**2 + (b * cross).sum(axis=0))


def attach(model: Any, adapters: base.Adapters) -> None:
    """Puts a DoRA into the slot of the embedding, if that is chosen."""
    if EMBEDDING in adapters.choice:
        (config,) = adapters.choice[EMBEDDING]
        model.embed.adapter = nnx.data(DoRAEmbedding(model.embed, config.rank))


initial = embedding.initial


def from_kernel(kernel: jax.Array) -> dict[str, jax.Array]:
    """First values that are the base's: the norms of a matrix's columns, float32 [D_out]."""
    norm = jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=0))
    return {"magnitude": norm, "norm": norm}


def tensors(config: Any, vocab_size: int, width: int) -> dict[str, Tensor]:
    """What PEFT stores of the embedding."""
    magnitude = Tensor("lora_magnitude_vector", (width,), SAME)
    return embedding.tensors(config, vocab_size, width) | {"magnitude": magnitude}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Any
) -> np.ndarray:
    """(m / n) (E + s A B) [V, D]."""
    table = embedding.merge(leaf, array, adapter, config)
    return table * (adapter["magnitude"] / np.linalg.norm(table, axis=0))
