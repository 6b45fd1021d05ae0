"""Vector-based random matrix adaptation, VeRA (Kopiczko et al. 2023, arXiv 2310.11454).

    y = x W + ((dropout(x) A * d) B) * b + bias        d [R] and b [D_out] train

A [D_in, R] and B [R, D_out] are frozen and random, cut from one pair for the widest of the adapted
layers. d starts at d_initial and b at zero, so the model starts as the base. As in PEFT 0.21.2
(`VERA`), which draws the pair with torch: uniform in +-sqrt(6 / fan_in), A before B, from a
Mersenne twister seeded with projection_prng_key. NumPy's gives the same bits: torch keeps the low
24 of 32.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import ops
from jaxtune.models.base import SAME
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import SharedConstant
from jaxtune.peft import base
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.patterns import Layers
from jaxtune.peft.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of VeRA."""

    rank: int
    d_initial: float = 0.1
    projection_prng_key: int = 0
    dropout: float = 0.0


class Layer(NamedTuple):
    """The knobs of one layer, with the widths of the random pair."""

    config: Config
    widest_in: int
    widest_out: int


READS = (Config, Targets, Saved, Biases)
APART = True
SHARED = ("projection_a", "projection_b")


def configure(config: Config, layers: Layers) -> dict[str, Layer]:
    """The same for all layers: the widest says how large the random pair is."""
    widest_in, widest_out = (max(sizes) for sizes in zip(*layers.values(), strict=True))
    return dict.fromkeys(layers, Layer(config, widest_in, widest_out))


@functools.lru_cache(maxsize=1)
def projections(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The random pair as PEFT stores it: A [R, widest D_in] and B [widest D_out, R], float32."""
    twister = np.random.RandomState(layer.config.projection_prng_key)

    def draw(rows: int, columns: int) -> np.ndarray:
        bits = twister.randint(0, 1 << 32, (rows, columns), dtype=np.uint32) & 0xFFFFFF
        bound = np.float32(np.sqrt(6.0 / columns)).astype(np.float64)
        # torch multiplies and adds with one rounding, in float32.
        return (bits * 2.0**-24 * (2 * bound) - bound).astype(np.float32)

    a = draw(layer.config.rank, layer.widest_in)
    return a, draw(layer.widest_out, layer.config.rank)


class VeRA(base.Dropping):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Layer | None], config: Config):
        del configs  # alike in all layers
        d_in, d_out = linear.kernel.get_value().shape[-2:]
        in_axis, out_axis = linear.axes
        self.dropout = config.dropout
        self.d = base.zeros(linear, (config.rank,), (None,))
        self.b = base.zeros(linear, (d_out,), (out_axis,))
        self.scale = base.constant(linear)
        self.projection_a = SharedConstant(jnp.zeros((d_in, config.rank)), axes=(in_axis, None))
        self.projection_b = SharedConstant(jnp.zeros((config.rank, d_out)), axes=(None, out_axis))
        self.key = nnx.data(None)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        noisy = x if self.key is None else base.dropped(x, self.dropout, self.key)
        a, b = linear.gathered_pair(self.projection_a.get_value(), self.projection_b.get_value())
        d = self.d.get_value().astype(x.dtype)
        factor = (self.b.get_value() * self.scale.get_value()).astype(x.dtype)
        inner = ops.dot(noisy, a.astype(x.dtype), x.dtype) * d
        return linear.project(x) + ops.dot(inner, b.astype(x.dtype), x.dtype) * factor


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a VeRA into the slots of the chosen layers."""
    base.fill_slots(model, adapters, VeRA)


def initial(
    leaf: str, shape: tuple[int, ...], config: Layer, rng: np.random.Generator
) -> np.ndarray:
    """First value of `d`, `b` or `scale` of one adapted layer, or of a projection; float32."""
    del rng
    if leaf in SHARED:
        a, b = projections(config)
        whole = a.T if leaf == "projection_a" else b.T
        return np.ascontiguousarray(whole[: shape[0], : shape[1]])
    first = {"d": config.config.d_initial, "b": 0.0, "scale": 1.0}[leaf]
    return np.full(shape, first, np.float32)


def tensors(config: Layer, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    return {
        "d": Tensor("vera_lambda_d", (config.config.rank,), SAME),
        "b": Tensor("vera_lambda_b", (d_out,), SAME),
    }


def fixed(config: Layer) -> dict[str, np.ndarray]:
    """The random pair, which a folder may hold (`save_projection`)."""
    a, b = projections(config)
    return {"base_model.vera_A": a, "base_model.vera_B": b}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Layer
) -> np.ndarray:
    """W + (A d) (B b) [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    a, b = projections(config)
    d_in, d_out = array.shape
    return array + (a[:, :d_in].T * adapter["d"]) @ (b[:d_out].T * adapter["b"])


PEFT = Format(
    "VERA",
    defaults={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "modules_to_save": None,
        "save_projection": True,
    },
    ignored=frozenset(("fan_in_fan_out", "init_weights", "layers_pattern", "save_projection")),
)


def to_peft(config: Config, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "r": config.rank,
        "d_initial": config.d_initial,
        "projection_prng_key": config.projection_prng_key,
        "vera_dropout": config.dropout,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    rank, key = fields.get("r"), fields.get("projection_prng_key", 0)
    if type(rank) is not int or rank < 1 or type(key) is not int:
        raise ValueError(f"r={rank!r}, projection_prng_key={key!r} are not numbers")
    return Config(
        rank=rank,
        d_initial=float(fields.get("d_initial", 0.1)),
        projection_prng_key=key,
        dropout=float(fields.get("vera_dropout") or 0.0),
    )
