"""Mixture of subspaces in LoRA (Wu et al. 2024, arXiv 2406.11909).

    y = x W + s (dropout(x) A) M B + bias        A [D_in, R], M [R, R], B [R, D_out], s = alpha / R

The mixer M trains too. A and M start uniform (torch's first value of a linear layer), B at zero.
PEFT does not have the method: its folders are jaxtune's own, LoRA's with `lora_AB.weight` [R, R]
beside lora_A and lora_B and the type MOSLORA, at which PEFT stops.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune.models.base import TRANSPOSE
from jaxtune.nn.linear import Linear
from jaxtune.peft import base, lora, patterns
from jaxtune.peft.base import Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """The knobs of MoSLoRA are LoRA's."""


READS = (Config, Targets, Saved, Biases)
configure = patterns.configure


class MoSLoRA(base.LowRank):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        self.dropout = config.dropout
        self.a, self.b = lora.pair(linear, configs)
        rank = self.b.get_value().shape[-2]
        self.mixer = base.zeros(linear, (rank, rank), (None, None))
        self.scale = base.constant(linear)
        self.key = nnx.data(None)

    def low_rank(self) -> tuple[jax.Array, jax.Array]:
        b = self.b.get_value() * self.scale.get_value()
        return self.a.get_value(), self.mixer.get_value() @ b


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a MoSLoRA into the slots of the chosen layers."""
    base.fill_slots(model, adapters, MoSLoRA)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of `a`, `mixer` [R, R], `b` or `scale` of one adapted layer, float32."""
    if leaf == "mixer":
        return base.padded(base.kaiming(rng, (config.rank, config.rank), config.rank), shape)
    return lora.initial(leaf, shape, config, rng)


def tensors(config: Config, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What a folder holds of a layer."""
    mixer = Tensor("lora_AB.weight", (config.rank,) * 2, TRANSPOSE, ("rank", "rank"))
    return lora.tensors(config, d_in, d_out) | {"mixer": mixer}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """W + s A M B [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    return array + config.scale * (adapter["a"] @ adapter["mixer"] @ adapter["b"])


PEFT = dataclasses.replace(lora.PEFT, peft_type="MOSLORA", accepted={})
to_peft = lora.to_peft


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    return Config(**dataclasses.asdict(lora.from_peft(fields)))
