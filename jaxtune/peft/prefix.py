"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190), P-tuning v2 (Liu et al. 2021, 2110.07602).

    attention of layer l = softmax(q [K_l; k]^T / sqrt(H)) [V_l; v]        K_l, V_l [P, K*H]

The keys K_l and values V_l are what trains. Every token sees them, in each packed example; they are
not rotated, and the tokens' positions begin at P behind them, as in PEFT 0.21.2. That is P-tuning
v2. With a projection K_l and V_l are tanh(E W + b) U_l + c_l of an embedding E [P, K*H], where E, W
and b are shared by all layers; after training only K_l and V_l are kept. They start as PEFT's,
normal with a standard deviation of 1, or at zero, which is not the base model either: a key of zero
takes its share of the softmax.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune.errors import ConfigError
from jaxtune.nn.attention import Attention
from jaxtune.nn.cache import KeysValues
from jaxtune.nn.params import AdapterParam
from jaxtune.peft import encoders
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
    """The knobs of prefix tuning; `encoder_hidden_size` None: as wide as the keys."""

    num_virtual_tokens: int
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prompt_init: str = "random"


READS = (Config,)
from_peft = functools.partial(finished, Config)
FINISHED = "prefix"
SLOT = "prefix"


class Table(nnx.Module):
    """Keys and values of every layer, float32 [L, P, K*H]."""

    def __init__(self, num_layers: int, length: int, width: int, mesh: Mesh | None):
        shape = (num_layers, length, width)
        self.length = length
        self.mesh = mesh
        self.keys = AdapterParam(jnp.zeros(shape), axes=(None, "kv_heads"))
        self.values = AdapterParam(jnp.zeros(shape), axes=(None, "kv_heads"))

    def __call__(self) -> KeysValues:
        found = (self.keys.get_value(), self.values.get_value())
        keys, values = (gathered(x, (None, "kv_heads"), self.mesh) for x in found)
        return keys, values


class Projection(nnx.Module):
    """The same as the output of a network."""

    def __init__(self, num_layers: int, length: int, width: int, hidden: int):
        self.length = length
        self.embedding = AdapterParam(jnp.zeros((length, width)), axes=(None, "kv_heads"))
        self.hidden = encoders.Dense((width, hidden), ("kv_heads", "mlp"))
        self.keys = encoders.Dense((num_layers, hidden, width), ("mlp", "kv_heads"))
        self.values = encoders.Dense((num_layers, hidden, width), ("mlp", "kv_heads"))

    def __call__(self) -> KeysValues:
        hidden = jnp.tanh(self.hidden(self.embedding.get_value()))
        return self.keys(hidden), self.values(hidden)


def attach(model: Any, adapters: Adapters) -> None:
    """Puts a prefix into the slot of a model.

    Raises:
        ConfigError: its layers do not all have the same kind of attention.
    """
    config = adapters.config
    found = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, Attention)]
    widths = {layer.k_proj.kernel.get_value().shape[-1] for layer in found}
    placed = any(kind.window for kind in model.config.layer_kinds)
    if placed or len(widths) != 1 or any(layer.config.alibi for layer in found):
        raise ConfigError(
            "config.peft.method=prefix needs layers whose keys are all of one width, without "
            "sliding windows and slopes, in which a prefix would have a place - use "
            "peft.method=prompt, or lora"
        )
    sizes = (sum(model.stacks), config.num_virtual_tokens, widths.pop())
    if config.prefix_projection:
        model.prefix = Projection(*sizes, config.encoder_hidden_size or sizes[-1])
    else:
        model.prefix = Table(*sizes, model.policy.mesh)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of a variable, float32, by its path in the slot."""
    starts_at_zero = config.prompt_init == "zero" and leaf.startswith(("keys", "values"))
    if starts_at_zero:
        return np.zeros(shape, np.float32)
    if "." in leaf:
        return encoders.initial(leaf.rsplit(".", 1)[-1], shape, rng)
    return rng.standard_normal(shape, np.float32)


def stored(model: Any) -> dict[str, jax.Array]:
    """PEFT's `prompt_embeddings` [P, L * 2 * K*H]: of each layer the keys, then the values."""
    keys_values = jnp.stack(model.prefix(), axis=1)  # [L, 2, P, K*H]
    return {PROMPT: keys_values.transpose(2, 0, 1, 3).reshape(keys_values.shape[2], -1)}


def sizes(
    config: Config, base_params: Mapping[str, Any], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """The shape of that."""
    found = (x.shape[-1] for name, x in base_params.items() if name.endswith("k_proj.kernel"))
    return {PROMPT: (config.num_virtual_tokens, 2 * num_layers * next(found, 0))}


def from_stored(
    arrays: Mapping[str, np.ndarray], config: Config, num_layers: int
) -> dict[str, np.ndarray]:
    """The variables of the slot, without projection."""
    table = arrays[PROMPT].reshape(config.num_virtual_tokens, num_layers, 2, -1)
    keys, values = table.transpose(2, 1, 0, 3)
    return {"keys": keys, "values": values}


PEFT = Format(
    "PREFIX_TUNING",
    defaults=PROMPT_DEFAULTS | {"encoder_hidden_size": None, "init_weights": None},
    ignored=PROMPT_IGNORED | {"encoder_hidden_size", "init_weights"},
    # A finished prefix is a table, whatever made it.
    accepted={"prefix_projection": (True, False)},
)


def to_peft(config: Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "prefix_projection": config.prefix_projection,
    }
