"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = x W + s (dropout(x) A) B        A [D_in, R], B [R, D_out], s = alpha / R

or s = alpha / sqrt(R) with rsLoRA (arXiv 2312.03732). A starts uniform in +-1/sqrt(D_in) and B at
zero, as in PEFT 0.21.2 (`init_lora_weights=True`), so the adapted model starts as the base. A and B
are float32 whatever the base's dtype; they are computed in the activations' dtype. Layers of a
stack that are not adapted have s = 0: they stay the base and their A and B get no gradient.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.nn.linear import Linear
from jaxtune.nn.params import AdapterConstant, AdapterParam, SeedKey


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


class LoRA(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, config: Config):
        *stack, d_in, d_out = linear.kernel.get_value().shape
        in_axis, out_axis = linear.axes
        self.dropout = config.dropout
        self.a = AdapterParam(jnp.zeros((*stack, d_in, config.rank)), axes=(in_axis, None))
        self.b = AdapterParam(jnp.zeros((*stack, config.rank, d_out)), axes=(None, out_axis))
        self.scale = AdapterConstant(jnp.zeros(stack), axes=())
        self.key = nnx.data(None)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        a = self.a.get_value()
        b = self.b.get_value() * self.scale.get_value()
        if self.key is None:
            return linear.adapt(x, a, b)
        keep = jax.random.bernoulli(self.key.get_value(), 1 - self.dropout, x.shape)
        dropped = jnp.where(keep, x / (1 - self.dropout), 0)
        return linear.project(x) + linear.low_rank(dropped, a, b)

    def seed(self, key: jax.Array, index: int) -> None:
        """Gives the layer its own key, if it has dropout."""
        if self.dropout:
            key = jax.random.fold_in(key, index)
            stack = self.scale.get_value().shape
            self.key = SeedKey(jax.random.split(key, stack) if stack else key)


def attach(linear: Linear, config: Config, chosen: tuple[bool, ...]) -> LoRA:
    """The adapter for a layer's slot."""
    del chosen  # every layer of the stack has one; `initial` gives those not chosen the scale 0
    return LoRA(linear, config)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, chosen: bool, rng: np.random.Generator
) -> np.ndarray:
    """First value of `a` [D_in, R], `b` [R, D_out] or `scale` [] of one layer, float32."""
    if leaf == "a":
        bound = shape[0] ** -0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if leaf == "b":
        return np.zeros(shape, np.float32)
    return np.asarray(config.scale if chosen else 0.0, np.float32)


def delta(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """What merging adds to the kernel: s A B, [D_in, D_out]."""
    return scale * (a @ b)
