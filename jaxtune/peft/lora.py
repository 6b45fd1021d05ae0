"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = x W + s (dropout(x) A) B        A [D_in, R], B [R, D_out], s = alpha / R

or s = alpha / sqrt(R) with rsLoRA (arXiv 2312.03732). A starts uniform in +-1/sqrt(D_in) and B at
zero, as in PEFT 0.21.2 (`init_lora_weights=True`), so the adapted model starts as the base. A and B
are float32 whatever the base's dtype; they are computed in the activations' dtype. Layers of a
stack that are not adapted have s = 0: they stay the base and their A and B get no gradient.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune.models.base import TRANSPOSE
from jaxtune.nn.linear import Linear
from jaxtune.peft.base import (
    Choice,
    Format,
    Tensor,
    common,
    constant,
    dropped,
    fill_slots,
    layer_key,
    padded,
    shapes,
    zeros,
)
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of LoRA."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


READS = (Config, Targets)


class LoRA(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None]):
        in_axis, out_axis = linear.axes
        sizes = shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
        self.dropout = common(configs).dropout
        self.a = zeros(linear, sizes["a"], (in_axis, None))
        self.b = zeros(linear, sizes["b"], (None, out_axis))
        self.scale = constant(linear)
        self.key = nnx.data(None)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        a = self.a.get_value()
        b = self.b.get_value() * self.scale.get_value()
        if self.key is None:
            return linear.adapt(x, a, b)
        noisy = dropped(x, self.dropout, self.key)
        return linear.project(x) + linear.low_rank(noisy, a, b)

    def seed(self, key: jax.Array, index: int) -> None:
        """Gives the layer its own key, if it has dropout."""
        if self.dropout:
            self.key = layer_key(key, index, self.scale.get_value().shape)


def attach(model: nnx.Module, choice: Choice) -> None:
    """Puts a LoRA into the slots of the chosen layers."""
    fill_slots(model, choice, LoRA)


def trained(names: Iterable[str], config: Config) -> set[str]:
    """None of the base's parameters."""
    del names, config
    return set()


def for_layer(config: Config, name: str) -> Config:
    """The same for all layers."""
    del name
    return config


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of `a` [D_in, R], `b` [R, D_out] or `scale` [] of one adapted layer, float32."""
    if leaf == "scale":
        return np.asarray(config.scale, np.float32)
    if leaf == "b":
        return np.zeros(shape, np.float32)
    bound = shape[0] ** -0.5
    return padded(rng.uniform(-bound, bound, (shape[0], config.rank)), shape)


def tensors(config: Config, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    return {
        "a": Tensor("lora_A.weight", (d_in, config.rank), TRANSPOSE),
        "b": Tensor("lora_B.weight", (config.rank, d_out), TRANSPOSE),
    }


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """W + s A B [D_in, D_out]; the bias stays."""
    return array + config.scale * (adapter["a"] @ adapter["b"]) if leaf == "kernel" else array


PEFT = Format(
    "LORA",
    defaults={
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "qalora_group_size": 16,
        "rank_pattern": {},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    },
    ignored=frozenset(
        ("eva_config", "fan_in_fan_out", "layers_pattern", "loftq_config", "megatron_config")
        + ("megatron_core", "qalora_group_size")
    ),
    # Ways to start an adapter that leave the base weights as they are.
    accepted={"init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")},
)


def to_peft(config: Config, layers: Mapping[str, Config]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says.

    Args:
        config: the knobs.
        layers: name in transformers -> the layer's own knobs.
    """
    ranks = {name: own.rank for name, own in layers.items()}
    alphas = {name: _number(own.alpha) for name, own in layers.items()}
    return {
        "r": config.rank,
        "rank_pattern": _pattern(ranks, config.rank),
        "alpha_pattern": _pattern(alphas, config.alpha),
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _pattern(values: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """Values that are not the usual one, by short names where all such layers have it."""
    short: dict[str, set] = {}
    for name, value in values.items():
        short.setdefault(name.rsplit(".", 1)[-1], set()).add(value)
    found = {}
    for name, value in values.items():
        last = name.rsplit(".", 1)[-1]
        if value != usual:
            found[last if len(short[last]) == 1 else name] = value
    return found


def _of_layer(fields: Mapping[str, Any], pattern: str, usual: str, name: str) -> Any:
    """A layer's own value, as PEFT 0.21.2 (get_pattern_key) finds it, or the usual one."""
    for key, value in (fields.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return fields.get(usual)


def from_peft(fields: Mapping[str, Any], name: str) -> Config:
    """The knobs of a layer by its name in transformers; "": those of no layer in particular.

    Raises:
        ValueError: r or lora_alpha is no number.
    """
    rank = _of_layer(fields, "rank_pattern", "r", name)
    alpha = _of_layer(fields, "alpha_pattern", "lora_alpha", name)
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"r={rank!r}, lora_alpha={alpha!r} are not numbers")
    return Config(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(fields.get("lora_dropout") or 0.0),
    )
