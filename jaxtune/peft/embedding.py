"""LoRA of the token embedding: PEFT's `lora_embedding_A` and `lora_embedding_B`.

    e(id) = E[id] + s A[id] B        A [V, R], B [R, D]

Nothing is made of size V x D. A starts at zero and B normal, the other way round than in a linear
layer, and there is no dropout. An output head that is tied to E keeps E, so a merged model is no
longer tied (PEFT 0.21.2 merges into both, and computes something else afterwards).

Source: PEFT 0.21.2 (tuners/lora/layer.py, `Embedding`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import ops
from jaxtune.models.base import TRANSPOSE
from jaxtune.nn.embed import Embed
from jaxtune.nn.params import AdapterConstant, AdapterParam
from jaxtune.peft import base
from jaxtune.peft.base import EMBEDDING, Tensor


class LoRAEmbedding(nnx.Module):
    """The adapter of the embedding."""

    def __init__(self, embed: Embed, rank: int):
        vocab_size, width = embed.table.get_value().shape
        self.a = AdapterParam(jnp.zeros((vocab_size, rank)), axes=("vocab", None))
        self.b = AdapterParam(jnp.zeros((rank, width)), axes=(None, "embed"))
        self.scale = AdapterConstant(jnp.zeros(()), axes=())

    def __call__(self, tokens: jax.Array, embed: Embed) -> jax.Array:
        x = embed.rows(tokens)
        a = self.a.get_value()[tokens].astype(x.dtype)
        b = (self.b.get_value() * self.scale.get_value()).astype(x.dtype)
        return x + ops.dot(a, b, x.dtype)

    def matrix(self, table: jax.Array) -> jax.Array:
        """What a tied head multiplies with: the base's table."""
        return table


def attach(model: Any, adapters: base.Adapters) -> None:
    """Puts a LoRA into the slot of the embedding, if that is chosen."""
    if EMBEDDING in adapters.choice:
        (config,) = adapters.choice[EMBEDDING]
        model.embed.adapter = nnx.data(LoRAEmbedding(model.embed, config.rank))


def initial(leaf: str, shape: tuple[int, ...], config: Any, rng: np.random.Generator) -> np.ndarray:
    """First value of `a` [V, R], `b` [R, D] or `scale` [], float32."""
    if leaf == "scale":
        return np.asarray(config.scale, np.float32)
    if leaf == "a":
        return np.zeros(shape, np.float32)
    return rng.normal(size=shape).astype(np.float32)


def tensors(config: Any, vocab_size: int, width: int) -> dict[str, Tensor]:
    """What PEFT stores of the embedding."""
    return {
        "a": Tensor("lora_embedding_A", (vocab_size, config.rank), TRANSPOSE),
        "b": Tensor("lora_embedding_B", (config.rank, width), TRANSPOSE),
    }


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Any
) -> np.ndarray:
    """E + s A B [V, D]."""
    assert leaf == "table"
    return array + config.scale * (adapter["a"] @ adapter["b"])
