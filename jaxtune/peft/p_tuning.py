"""P-tuning (Liu et al. 2021, arXiv 2103.10385): virtual tokens that a network makes while training.

    P = network(E)        E [n, D]; P as in prompt tuning

The network is an MLP of three linear layers with ReLU between them, or a bidirectional LSTM and an
MLP of two, as in PEFT 0.21.2. After training only P is kept.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.nn.params import AdapterParam
from jaxtune.peft import encoders, prompt
from jaxtune.peft.base import (
    PROMPT_DEFAULTS,
    PROMPT_IGNORED,
    Adapters,
    Format,
    finished,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of P-tuning; `encoder_hidden_size` None: the width of the model."""

    num_virtual_tokens: int
    encoder: str = "mlp"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2


READS = (Config,)
from_peft = functools.partial(finished, Config)
FINISHED = "prompt"
SLOT = "embed.prompt"


class MLPPrompt(nnx.Module):
    """Virtual tokens [P, D] from three linear layers."""

    def __init__(self, length: int, width: int, hidden: int):
        self.length = length
        self.embedding = AdapterParam(jnp.zeros((length, width)), axes=(None, "embed"))
        self.first = encoders.Dense((width, hidden), ("embed", "mlp"))
        self.second = encoders.Dense((hidden, hidden), (None, "mlp"))
        self.third = encoders.Dense((hidden, width), ("mlp", "embed"))

    def __call__(self) -> jax.Array:
        x = jax.nn.relu(self.first(self.embedding.get_value()))
        return self.third(jax.nn.relu(self.second(x)))


class LSTMPrompt(nnx.Module):
    """Virtual tokens [P, D] from a bidirectional LSTM and two linear layers."""

    def __init__(self, length: int, width: int, hidden: int, num_layers: int):
        self.length = length
        self.embedding = AdapterParam(jnp.zeros((length, width)), axes=(None, "embed"))
        self.lstm = encoders.BiLSTM(width, hidden, num_layers)
        self.first = encoders.Dense((2 * hidden, 2 * hidden), (None, "mlp"))
        self.second = encoders.Dense((2 * hidden, width), ("mlp", "embed"))

    def __call__(self) -> jax.Array:
        return self.second(jax.nn.relu(self.first(self.lstm(self.embedding.get_value()))))


def attach(model: Any, adapters: Adapters) -> None:
    """Puts the network that makes virtual tokens into the slot of a model's embedding."""
    config = adapters.config
    width = model.embed.table.get_value().shape[-1]
    sizes = (config.num_virtual_tokens, width, config.encoder_hidden_size or width)
    if config.encoder == "lstm":
        model.embed.prompt = LSTMPrompt(*sizes, config.encoder_num_layers)
    else:
        model.embed.prompt = MLPPrompt(*sizes)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of a variable, float32, by its path in the slot."""
    del config
    if leaf == "embedding":
        return rng.standard_normal(shape, np.float32)
    return encoders.initial(leaf.rsplit(".", 1)[-1], shape, rng)


stored = prompt.stored


PEFT = Format(
    "P_TUNING",
    defaults=PROMPT_DEFAULTS | {"encoder_dropout": 0.0},
    # The network is gone.
    ignored=PROMPT_IGNORED | {"encoder_dropout"},
    accepted={"encoder_reparameterization_type": ("MLP", "LSTM")},
)


def to_peft(config: Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "encoder_reparameterization_type": config.encoder.upper(),
        "encoder_hidden_size": config.encoder_hidden_size,
        "encoder_num_layers": config.encoder_num_layers,
    }
