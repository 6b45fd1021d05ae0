"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691).

    embeddings of an example = [P_1 ... P_n; E(tokens)]        P [n, D]

The virtual tokens P_i are what trains. Every example begins with them, in packed rows too; they
have positions of their own, and no loss. As in PEFT 0.21.2 they start normal with a standard
deviation of 1, as the embeddings of random tokens, or as those of a text, repeated or cut to n.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.nn.params import AdapterParam
from jaxtune.peft.base import (
    PROMPT,
    PROMPT_DEFAULTS,
    PROMPT_IGNORED,
    Adapters,
    Format,
    finished,
)
from jaxtune.sharding.rules import gathered


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of prompt tuning."""

    num_virtual_tokens: int
    prompt_init: str = "random"
    prompt_init_text: str | None = None


READS = (Config,)
from_peft = functools.partial(finished, Config)
FINISHED = "prompt"
SLOT = "embed.prompt"


class Table(nnx.Module):
    """Virtual tokens, float32 [P, D]."""

    def __init__(self, length: int, width: int, mesh: Mesh | None):
        self.length = length
        self.mesh = mesh
        self.table = AdapterParam(jnp.zeros((length, width)), axes=(None, "embed"))

    def __call__(self) -> jax.Array:
        return gathered(self.table.get_value(), (None, "embed"), self.mesh)


def attach(model: Any, adapters: Adapters) -> None:
    """Puts virtual tokens into the slot of a model's embedding."""
    config = adapters.config
    width = model.embed.table.get_value().shape[-1]
    model.embed.prompt = Table(config.num_virtual_tokens, width, model.policy.mesh)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of the table [P, D], float32, unless it starts as embeddings."""
    del leaf, config
    return rng.standard_normal(shape, np.float32)


def start_ids(
    config: Config, vocab_size: int, encode: Callable[[str], list[int]], seed: int
) -> np.ndarray:
    """Ids of the tokens [P] as whose embeddings a prompt starts: of a text, or random ones.

    Args:
        config: the knobs, with prompt_init text or vocab.
        vocab_size: rows of the embedding table.
        encode: text -> ids, with the special tokens that the tokenizer adds.
        seed: of random ids.
    """
    if config.prompt_init_text is None:
        return np.random.default_rng(seed).integers(0, vocab_size, config.num_virtual_tokens)
    return np.resize(np.asarray(encode(config.prompt_init_text)), config.num_virtual_tokens)


def stored(model: Any) -> dict[str, jax.Array]:
    """PEFT's `prompt_embeddings` [P, D]."""
    return {PROMPT: model.embed.prompt()}


def sizes(
    config: Any, base_params: Mapping[str, Any], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """The shape of that."""
    del num_layers
    return {PROMPT: (config.num_virtual_tokens, base_params["embed.table"].shape[-1])}


def from_stored(
    arrays: Mapping[str, np.ndarray], config: Config, num_layers: int
) -> dict[str, np.ndarray]:
    """The variable of the slot."""
    del config, num_layers
    return {"table": arrays[PROMPT]}


PEFT = Format(
    "PROMPT_TUNING",
    defaults=PROMPT_DEFAULTS
    | {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
    # How a prompt started says nothing about what it is.
    ignored=PROMPT_IGNORED
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"}
    | {"tokenizer_name_or_path"},
)


def to_peft(config: Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says of a finished prompt."""
    del layers
    return {"num_virtual_tokens": config.num_virtual_tokens}
