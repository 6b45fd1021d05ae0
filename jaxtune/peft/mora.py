"""High-rank updating with square matrices, MoRA (Jiang et al. 2024, arXiv 2405.12130).

    y = x W + decompress(compress(dropout(x)) M) + bias        M [S, S], S = sqrt((D_in + D_out) R)

S is rounded, so M has about as many parameters as a LoRA of rank R and full rank. Sharing (for
large R) adds the blocks of S features of x; rotation (for small R, S even) keeps them apart, turns
block i by the angles i * 10000^(-2 j / S) as rotary positions do, and applies M to each. Both fill
the last block with the first features, and repeat or cut the result to D_out. M starts at zero and
there is no scale, as in the authors' code (types 1 and 6).

PEFT does not have the method: its folders are jaxtune's own, with `mora_M.weight` [S, S] (out, in)
and the type MORA, at which PEFT stops.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import TRANSPOSE
from jaxtune.nn.linear import Linear
from jaxtune.peft import base
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Saved
from jaxtune.peft.patterns import Layers
from jaxtune.peft.targets import Targets
from jaxtune.sharding.rules import TOKENS, constrained


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of MoRA."""

    rank: int
    mora_type: str = "rotation"
    dropout: float = 0.0


class Layer(NamedTuple):
    """The knobs of one layer: the size S of its matrix and the type."""

    size: int
    mora_type: str


READS = (Config, Targets, Saved)
APART = True
_NUMBERS = {"sharing": 1, "rotation": 6}  # of the authors' types


def configure(config: Config, layers: Layers) -> dict[str, Layer]:
    """The size of each layer's matrix."""
    sizes = {name: int(math.sqrt(sum(d) * config.rank) + 0.5) for name, d in layers.items()}
    even = config.mora_type == "rotation"
    return {name: Layer(s - s % 2 if even else s, config.mora_type) for name, s in sizes.items()}


class MoRA(base.Dropping):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Layer | None], config: Config):
        self.layer = base.common(configs)
        self.dropout = config.dropout
        self.matrix = base.zeros(linear, (self.layer.size, self.layer.size), (None, None))
        self.scale = base.constant(linear)
        self.key = nnx.data(None)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        noisy = x if self.key is None else base.dropped(x, self.dropout, self.key)
        matrix = (self.matrix.get_value() * self.scale.get_value()).astype(x.dtype)
        y, mesh = linear.project(x), linear.policy.mesh
        # Blocks of features cross the shards of the width, which the partitioner gets wrong.
        noisy = constrained(noisy, TOKENS, mesh)
        added = change(noisy, matrix, self.layer.mora_type, y.shape[-1])
        return y + constrained(added, TOKENS, mesh)


def change(x: jax.Array, matrix: jax.Array, mora_type: str, d_out: int) -> jax.Array:
    """What MoRA adds: [..., D_in] -> [..., D_out] for a matrix [S, S] (in, out)."""
    size = matrix.shape[0]
    count = -(-x.shape[-1] // size)
    blocks = _repeated(x, count * size).reshape(*x.shape[:-1], count, size)
    if mora_type == "sharing":
        return _repeated(blocks.sum(axis=-2) @ matrix, d_out)
    angles = np.arange(count)[:, None] * 10000.0 ** (-2 * np.arange(size // 2) / size)
    cos, sin = (jnp.asarray(f(np.concatenate([angles] * 2, -1)), x.dtype) for f in (np.cos, np.sin))
    first, second = jnp.split(blocks, 2, axis=-1)
    turned = blocks * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return _repeated((turned @ matrix).reshape(*x.shape[:-1], -1), d_out)


def _repeated(x: jax.Array, width: int) -> jax.Array:
    """The last axis repeated from its beginning, or cut, to a width."""
    times = -(-width // x.shape[-1])
    return jnp.concatenate([x] * times, axis=-1)[..., :width]


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a MoRA into the slots of the chosen layers."""
    base.fill_slots(model, adapters, MoRA)


def initial(
    leaf: str, shape: tuple[int, ...], config: Layer, rng: np.random.Generator
) -> np.ndarray:
    """First value of `matrix` (zero) or `scale` (one) of one adapted layer, float32."""
    del config, rng
    return np.ones(shape, np.float32) if leaf == "scale" else np.zeros(shape, np.float32)


def tensors(config: Layer, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What a folder holds of a layer."""
    del d_in, d_out
    return {"matrix": Tensor("mora_M.weight", (config.size, config.size), TRANSPOSE)}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Layer
) -> np.ndarray:
    """W and what MoRA makes of the unit vectors [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    d_in, d_out = array.shape
    matrix = jnp.asarray(adapter["matrix"])
    return array + np.asarray(change(jnp.eye(d_in), matrix, config.mora_type, d_out))


PEFT = Format(
    "MORA",
    defaults={"exclude_modules": None, "layers_pattern": None, "modules_to_save": None},
    ignored=frozenset(("layers_pattern",)),
)


def to_peft(config: Config, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "r": config.rank,
        "mora_type": _NUMBERS[config.mora_type],
        "mora_dropout": config.dropout,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are not."""
    rank, number = fields.get("r"), fields.get("mora_type")
    kinds = {value: key for key, value in _NUMBERS.items()}
    if type(rank) is not int or rank < 1 or number not in kinds:
        raise ValueError(f"r={rank!r}, mora_type={number!r}")
    return Config(
        rank=rank, mora_type=kinds[number], dropout=float(fields.get("mora_dropout") or 0.0)
    )
