"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = x W + s (dropout(x) A) B        A [D_in, R], B [R, D_out], s = alpha / R

or s = alpha / sqrt(R) with rsLoRA (arXiv 2312.03732). A starts uniform in +-1/sqrt(D_in) and B at
zero, as in PEFT 0.21.2 (`init_lora_weights=True`), so the adapted model starts as the base; or both
start as a part of W (`peft.split`). A and B are float32 whatever the base's dtype; they are
computed in the activations' dtype. Layers of a stack that are not adapted have s = 0: they stay the
base and their A and B get no gradient. With `lora_bias` B has a bias [D_out], of which s times is
added; a merge adds it to the layer's own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune.models.base import SAME, TRANSPOSE
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import AdapterParam
from jaxtune.peft import base, embedding, patterns, tokens
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.split import AGAIN, Start
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of LoRA."""

    rank: int
    alpha: float
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0
    lora_bias: bool = False

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


READS = (Config, Targets, Saved, Biases, Start, tokens.Config)
ON_EMBEDDING = embedding
EXPERTS = True
configure = patterns.configure


class LoRA(base.LowRank):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        self.dropout = config.dropout
        self.a, self.b = pair(linear, configs)
        self.bias: Any = nnx.data(None)
        if config.lora_bias:
            d_out = linear.kernel.get_value().shape[-1]
            self.bias = base.zeros(linear, (d_out,), (linear.axes[1],))
        self.scale = base.constant(linear)
        self.key = nnx.data(None)

    def low_rank(self) -> tuple[jax.Array, jax.Array]:
        return self.a.get_value(), self.b.get_value() * self.scale.get_value()[..., None, None]

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        y = super().__call__(x, linear)
        if self.bias is None:
            return y
        return y + (self.bias.get_value() * self.scale.get_value()).astype(y.dtype)


def pair(linear: Linear, configs: Sequence[Any]) -> tuple[AdapterParam, AdapterParam]:
    """A [D_in, R] and B [R, D_out] for a stack of layers, R the largest rank of them."""
    in_axis, out_axis = linear.axes[-2:]
    sizes = base.shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
    a = base.zeros(linear, sizes["a"], (in_axis, None))
    return a, base.zeros(linear, sizes["b"], (None, out_axis))


def with_rank(config: Any, rank: int) -> Any:
    """Another rank with the same scale."""
    growth = rank / config.rank
    alpha = config.alpha * (growth**0.5 if getattr(config, "rslora", False) else growth)
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a LoRA into the slots of the chosen layers and of the embedding."""
    base.fill_slots(model, adapters, LoRA)
    embedding.attach(model, adapters)


def initial(leaf: str, shape: tuple[int, ...], config: Any, rng: np.random.Generator) -> np.ndarray:
    """First value of `a` [D_in, R], `b` [R, D_out], `bias` [D_out] or `scale` [] of a layer.

    Those of experts have a leading axis over them.
    """
    if leaf == "scale":
        return np.full(shape, config.scale, np.float32)
    if leaf in ("b", "bias"):
        return np.zeros(shape, np.float32)
    *experts, d_in, _ = shape
    return base.padded(base.kaiming(rng, (*experts, d_in, config.rank), d_in), shape)


def tensors(config: Any, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    found = {
        "a": Tensor("lora_A.weight", (d_in, config.rank), TRANSPOSE, ("in", "rank")),
        "b": Tensor("lora_B.weight", (config.rank, d_out), TRANSPOSE, ("rank", "out"), scaled=True),
    }
    if config.lora_bias:
        found["bias"] = Tensor("lora_B.bias", (d_out,), SAME, ("out",), scaled=True)
    return found


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """W + s A B [D_in, D_out]; the bias stays, but for s times that of B."""
    if leaf == "kernel":
        return array + config.scale * (adapter["a"] @ adapter["b"])
    return array + config.scale * adapter["bias"] if config.lora_bias else array


PEFT = Format(
    "LORA",
    defaults={
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "exclude_modules": None,
        "eva_config": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    },
    ignored=frozenset(
        ("eva_config", "fan_in_fan_out", "layers_pattern", "loftq_config", "megatron_config")
        + ("megatron_core", "qalora_group_size")
    ),
    # Ways to start an adapter that leave the base weights as they are, or take the same again.
    accepted={
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica", *AGAIN)
    },
)


def to_peft(config: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says.

    Args:
        config: the knobs.
        layers: name in transformers -> the layer's own knobs.
    """
    return {
        **patterns.to_peft(config, layers, "r", "lora_alpha"),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "lora_bias": config.lora_bias,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    return Config(
        **patterns.from_peft(fields, "r", "lora_alpha"),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(fields.get("lora_dropout") or 0.0),
        lora_bias=bool(fields.get("lora_bias")),
    )
