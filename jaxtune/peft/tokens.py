"""Single rows of the embedding, and of a head of its own: for tokens that are new, say.

    e(id) = rows[k] if id is the k-th of `trainable_tokens`, else E[id]

The rows start as those of the base. A head that is tied to the embedding has them too. As a method
nothing else trains (PEFT's TRAINABLE_TOKENS); beside LoRA and DoRA it is `trainable_token_indices`.
PEFT calls the stored rows a delta, but they are whole.

A head with trained rows needs the gradient of all its rows, as in PEFT.

Source: PEFT 0.21.2 (tuners/trainable_tokens, utils/other.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.errors import ConfigError
from jaxtune.models.base import SAME
from jaxtune.nn.embed import Embed
from jaxtune.nn.params import AdapterParam
from jaxtune.peft import base
from jaxtune.peft.base import EMBEDDING, Choice, Format, Tensor

HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ids of the tokens whose rows train."""

    trainable_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The trained rows of one matrix.

    Attributes:
        ids: of the tokens.
        axis: of the matrix, along which its tokens lie: 0 of the embedding, 1 of a head.
        alone: whether nothing else is adapted, which changes PEFT's name of the tensor.
    """

    ids: tuple[int, ...]
    axis: int
    alone: bool


READS = (Config,)


class TokenRows(nnx.Module):
    """Rows [n, D] in place of the base's."""

    def __init__(self, rows: Rows, width: int):
        self.ids = rows.ids
        self.axis = rows.axis
        self.rows = AdapterParam(jnp.zeros((len(rows.ids), width)), axes=("tokens", "embed"))

    def __call__(self, tokens: jax.Array, embed: Embed) -> jax.Array:
        x, order = embed.rows(tokens), np.argsort(self.ids)
        ids = np.asarray(self.ids, np.int32)[order]
        place = jnp.minimum(jnp.searchsorted(ids, tokens), len(ids) - 1)
        own = self.rows.get_value()[order][place].astype(x.dtype)
        return jnp.where((jnp.asarray(ids)[place] == tokens)[..., None], own, x)

    def matrix(self, weight: jax.Array) -> jax.Array:
        """A table [V, D] or head [D, V] with the rows in it."""
        rows, ids = self.rows.get_value().astype(weight.dtype), np.asarray(self.ids)
        return weight.at[ids].set(rows) if self.axis == 0 else weight.at[:, ids].set(rows.T)

    def seed(self, key: jax.Array, index: int) -> None:
        """There is no dropout."""
        del key, index


def choose(model: Any, ids: Sequence[int], choice: Choice, *, alone: bool) -> Choice:
    """The rows of the embedding, and of a head that is not tied to it.

    Args:
        model: a decoder.
        ids: of the tokens.
        choice: layers that are adapted.
        alone: see `Rows`.

    Raises:
        ConfigError: an id comes twice, the model has no such token, or the embedding is adapted.
    """
    if ids and EMBEDDING in choice:
        raise ConfigError(
            "config.peft.trainable_tokens: the embedding is adapted as a whole - take it out of "
            "peft.target_modules, or leave trainable_tokens empty"
        )
    vocab_size = model.config.vocab_size
    wrong = sorted({i for i in ids if not 0 <= i < vocab_size or list(ids).count(i) > 1})
    if wrong:
        raise ConfigError(
            f"config.peft.trainable_tokens: {wrong[0]} comes twice, or is not among the model's "
            f"ids 0 to {vocab_size - 1} - name each id once"
        )
    rows: Choice = {EMBEDDING: (Rows(tuple(ids), 0, alone),)} if ids else {}
    if ids and model.lm_head is not None:
        rows = {**rows, HEAD: (Rows(tuple(ids), 1, alone),)}
    return rows


def attach(model: Any, adapters: base.Adapters) -> None:
    """Puts trained rows into the slots of the embedding and the head."""
    for path, (rows,) in adapters.rows.items():
        layer = model.embed if path == EMBEDDING else model.lm_head
        layer.adapter = nnx.data(TokenRows(rows, model.embed.table.get_value().shape[-1]))


def first(rows: Rows, weight: jax.Array) -> jax.Array:
    """First value of `rows`: those of the base, float32 [n, D]."""
    found = jnp.take(weight, np.asarray(rows.ids), axis=rows.axis).astype(jnp.float32)
    return found if rows.axis == 0 else found.T


def tensors(rows: Rows, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a matrix."""
    width = d_in if rows.axis else d_out
    suffix = "trainable_tokens_delta"
    name = suffix if rows.alone else f"token_adapter.{suffix}"
    return {"rows": Tensor(name, (len(rows.ids), width), SAME)}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], rows: Rows
) -> np.ndarray:
    """The table or head with its rows; the bias stays."""
    if leaf == "bias":
        return array
    whole, ids = np.array(array), np.asarray(rows.ids)
    np.moveaxis(whole, rows.axis, 0)[ids] = adapter["rows"]
    return whole


PEFT = Format(
    "TRAINABLE_TOKENS",
    defaults={"init_weights": True},
    accepted={"init_weights": (True, False)},
    has_layers=False,
)


def to_peft(config: Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {"token_indices": list(config.trainable_tokens)}


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    return Config(trainable_tokens=token_ids(fields.get("token_indices")))


def token_ids(found: Any) -> tuple[int, ...]:
    """Ids of tokens as adapter_config.json has them; ValueError if they are no numbers."""
    if not isinstance(found, list) or not found or not all(type(i) is int for i in found):
        raise ValueError(f"token indices {found!r} are no list of numbers")
    return tuple(found)
