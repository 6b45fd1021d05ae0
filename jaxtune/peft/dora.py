"""Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

    y = (m / n) * (x (W + s A B)) + bias        n = norms of the columns of W + s A B

m [D_out] trains beside LoRA's A and B and starts as the norms of W, so the model starts as the
base. n is a constant for the gradient (section 4.3 of the paper, and PEFT 0.21.2). With dropout the
change y - (x W + bias) is computed from the dropped x, as PEFT does.

W + s A B is never made: its norms follow from those of W, kept as a constant, and products with R
rows (`dora_embedding.norms`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import SAME
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import AdapterConstant
from jaxtune.peft import base, dora_embedding, lora, patterns, tokens
from jaxtune.peft.base import Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """The knobs of DoRA are LoRA's."""


READS = (Config, Targets, Saved, Biases, tokens.Config)
ON_EMBEDDING = dora_embedding
FROM_KERNEL = dora_embedding.FROM_KERNEL
configure = patterns.configure


class DoRA(base.Dropping):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        self.dropout = config.dropout
        self.a, self.b = lora.pair(linear, configs)
        self.scale = base.constant(linear)
        self.key = nnx.data(None)
        d_out = linear.kernel.get_value().shape[-1]
        self.magnitude = base.zeros(linear, (d_out,), (linear.axes[1],))
        self.norm = AdapterConstant(self.magnitude.get_value(), axes=(linear.axes[1],))

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        weight, scale = linear.weight(), self.scale.get_value()
        a, b = self.a.get_value(), self.b.get_value() * scale
        norm = jax.lax.stop_gradient(self._norm(a, b, linear, weight))
        ratio = jnp.where(scale == 0, 1, self.magnitude.get_value() / norm).astype(x.dtype)
        if self.key is None:
            return linear.add_bias(ratio * linear.adapted_product(x, weight, a, b))
        noisy = base.dropped(x, self.dropout, self.key)
        change = (ratio - 1) * linear.product(noisy, weight)
        change += ratio * linear.low_rank(noisy, a, b)
        return linear.add_bias(linear.product(x, weight) + change)

    def _norm(self, a: jax.Array, b: jax.Array, linear: Linear, weight: Any) -> jax.Array:
        """Norms of the columns of W + a b, float32 [D_out]."""
        a, b = jax.lax.stop_gradient((a, b))
        projected = linear.product(a.T, weight)
        return dora_embedding.norms(self.norm.get_value(), a, b, projected)


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a DoRA into the slots of the chosen layers and of the embedding."""
    base.fill_slots(model, adapters, DoRA)
    dora_embedding.attach(model, adapters)


initial = lora.initial
from_kernel = dora_embedding.from_kernel


def tensors(config: Any, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    magnitude = Tensor("lora_magnitude_vector", (d_out,), SAME, ("out",), absent=None)
    return lora.tensors(config, d_in, d_out) | {"magnitude": magnitude}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """(m / n) (W + s A B) [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    weight = array + config.scale * (adapter["a"] @ adapter["b"])
    return weight * (adapter["magnitude"] / np.linalg.norm(weight, axis=0))


PEFT = dataclasses.replace(
    lora.PEFT, defaults={**lora.PEFT.defaults, "use_dora": True}, marks={"use_dora": True}
)
to_peft = lora.to_peft


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    return Config(**dataclasses.asdict(lora.from_peft(fields)))
