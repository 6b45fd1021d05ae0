"""Low-rank Hadamard products, LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098; LyCORIS).

    y = x (W + s (A1 B1) * (A2 B2)) + bias        A [D_in, R], B [R, D_out], s = alpha / R

The elementwise product of two matrices of rank R is one of rank R^2, whose factors are the
products of all pairs of columns of A1 and A2 and of rows of B1 and B2. They take the way of LoRA's
factors, so the D_in x D_out product is never kept. As in PEFT 0.21.2 (`LOHA`), where hada_w*_b is
our A and hada_w*_a our B: A2 starts at zero, so the model starts as the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune.models.base import TRANSPOSE
from jaxtune.nn.linear import Linear
from jaxtune.peft import base, patterns
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Saved
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of LoHa."""

    rank: int
    alpha: float
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank


READS = (Config, Targets, Saved)
configure = patterns.configure


class LoHa(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        in_axis, out_axis = linear.axes
        sizes = base.shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
        self.a1, self.a2 = (base.zeros(linear, sizes[x], (in_axis, None)) for x in ("a1", "a2"))
        self.b1, self.b2 = (base.zeros(linear, sizes[x], (None, out_axis)) for x in ("b1", "b2"))
        self.scale = base.constant(linear)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        a1, a2, b1, b2 = (v.get_value() for v in (self.a1, self.a2, self.b1, self.b2))
        a = (a1[:, :, None] * a2[:, None, :]).reshape(a1.shape[0], -1)
        b = (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])
        return linear.adapt(x, a, b * self.scale.get_value())

    def seed(self, key: jax.Array, index: int) -> None:
        """LoHa has no dropout."""


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a LoHa into the slots of the chosen layers."""
    base.fill_slots(model, adapters, LoHa)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of `a1`, `b1`, `a2`, `b2` or `scale` of one adapted layer, float32."""
    if leaf == "scale":
        return np.asarray(config.scale, np.float32)
    if leaf == "a2":
        return np.zeros(shape, np.float32)
    own = (shape[0], config.rank) if leaf[0] == "a" else (config.rank, shape[1])
    # torch takes the last axis of its own layout for the number of inputs.
    return base.padded(base.kaiming(rng, own, own[0]), shape)


def tensors(config: Config, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    a, b = (d_in, config.rank), (config.rank, d_out)
    return {
        "a1": Tensor("hada_w1_b", a, TRANSPOSE, ("in", "rank")),
        "b1": Tensor("hada_w1_a", b, TRANSPOSE, ("rank", "out"), scaled=True),
        "a2": Tensor("hada_w2_b", a, TRANSPOSE, ("in", "rank")),
        "b2": Tensor("hada_w2_a", b, TRANSPOSE, ("rank", "out")),
    }


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """W + s (A1 B1) * (A2 B2) [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    product = (adapter["a1"] @ adapter["b1"]) * (adapter["a2"] @ adapter["b2"])
    return array + config.scale * product


PEFT = Format(
    "LOHA",
    defaults={
        "exclude_modules": None,
        "init_weights": True,
        "layers_pattern": None,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "rank_dropout": 0.0,
        "use_effective_conv2d": False,
    },
    ignored=frozenset(
        ("init_weights", "layers_pattern", "module_dropout", "rank_dropout")
        + ("use_effective_conv2d",)
    ),
)


def to_peft(config: Config, layers: Mapping[str, Config]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    return patterns.to_peft(config, layers, "r", "alpha")


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    return Config(**patterns.from_peft(fields, "r", "alpha"))
