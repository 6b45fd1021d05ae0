"""Infused adapter by inhibiting and amplifying inner activations, (IA)3 (Liu et al. 2022, arXiv
2205.05638).

    y = (x W + bias) * l        l [D_out]
    y = (x * l) W + bias        l [D_in], for layers named by feedforward_modules

l starts at one, so the model starts as the base. As in PEFT 0.21.2 (`IA3`); the paper adapts
k_proj, v_proj and the MLP's second layer, down_proj.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models.base import Change
from jaxtune.nn.linear import Linear
from jaxtune.peft import base
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Saved
from jaxtune.peft.patterns import Layers
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of (IA)3."""

    feedforward_modules: tuple[str, ...]


class Layer(NamedTuple):
    """The knobs of one layer: whether its input is scaled, or its output."""

    feedforward: bool


READS = (Config, Targets, Saved)
_ROW = Change(lambda array: array[0], lambda array: array[None])
_COLUMN = Change(lambda array: array[:, 0], lambda array: array[:, None])


def configure(config: Config, layers: Layers) -> dict[str, Layer]:
    """Which layers are scaled at their input."""
    patterns = config.feedforward_modules
    return {name: Layer(any(tree.matches(p, name) for p in patterns)) for name in layers}


class IA3(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Layer | None], config: Config):
        d_in, d_out = linear.kernel.get_value().shape[-2:]
        in_axis, out_axis = linear.axes
        self.feedforward = base.common(configs).feedforward
        if any(config is not None and config.feedforward != self.feedforward for config in configs):
            raise ConfigError(
                "config.peft.feedforward_modules names some layers of a scanned stack and not "
                "others - name all of them, or set model.layers=unroll"
            )
        size, axis = (d_in, in_axis) if self.feedforward else (d_out, out_axis)
        self.factor = base.zeros(linear, (size,), (axis,))
        self.scale = base.constant(linear)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        # A layer of the stack that is not adapted has scale 0.
        factor = jnp.where(self.scale.get_value() == 0, 1, self.factor.get_value()).astype(x.dtype)
        if self.feedforward:
            return linear.project(x * factor)
        return linear.project(x) * factor

    def seed(self, key: jax.Array, index: int) -> None:
        """(IA)3 has no dropout."""


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts an (IA)3 into the slots of the chosen layers."""
    base.fill_slots(model, adapters, IA3)


def initial(
    leaf: str, shape: tuple[int, ...], config: Layer, rng: np.random.Generator
) -> np.ndarray:
    """First value of `factor` or `scale` of one adapted layer: ones, float32."""
    del leaf, config, rng
    return np.ones(shape, np.float32)


def tensors(config: Layer, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    if config.feedforward:
        return {"factor": Tensor("ia3_l", (d_in,), _ROW, ("in",))}
    return {"factor": Tensor("ia3_l", (d_out,), _COLUMN, ("out",), absent=1.0)}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Layer
) -> np.ndarray:
    """The kernel's rows times l, or its columns and the bias."""
    factor = adapter["factor"]
    if config.feedforward:
        return array * factor[:, None] if leaf == "kernel" else array
    return array * factor


PEFT = Format(
    "IA3",
    defaults={
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
    },
    ignored=frozenset(("fan_in_fan_out", "init_ia3_weights")),
    has_layers=False,
)


def to_peft(config: Config, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    names = sorted(name for name, layer in layers.items() if layer.feedforward)
    return {"feedforward_modules": names}


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes."""
    names = fields.get("feedforward_modules") or ()
    return Config(feedforward_modules=(names,) if isinstance(names, str) else tuple(names))
