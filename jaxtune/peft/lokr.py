"""Low-rank Kronecker products, LoKr (Edalati et al. 2022, KronA, arXiv 2212.10650; LyCORIS).

    y = x W + s (kron(w1, w2) x) + bias        w1 [L, M], w2 [K, N], D_out = L K, D_in = M N

s = alpha / R. w2 is the product of w2_a [K, R] and w2_b [R, N] where that is smaller (R below half
of K or N), and with decompose_both w1 likewise. The product is applied factor by factor and never
made. As in PEFT 0.21.2 (`LOKR`, shapes as stored there): w1 (or w1_a) starts at zero, so the model
starts as the base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import SAME
from jaxtune.nn.linear import Linear
from jaxtune.peft import base
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Saved
from jaxtune.peft.patterns import Layers, plain
from jaxtune.peft.targets import Targets
from jaxtune.sharding.rules import TOKENS, constrained


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of LoKr."""

    rank: int
    alpha: float
    decompose_both: bool = False
    decompose_factor: int = -1

    @property
    def scale(self) -> float:
        """Factor of the product, also where no factor of rank R is kept."""
        return self.alpha / self.rank


READS = (Config, Targets, Saved)
APART = True


def configure(config: Config, layers: Layers) -> dict[str, Config]:
    """The same for all layers."""
    return dict.fromkeys(layers, config)


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`.

    `factor` and the rest if it divides; else, and for -1, the divisors nearest to each other whose
    smaller one is at most `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    smaller = max(d for d in range(1, most + 1) if size % d == 0)
    return smaller, size // smaller


class LoKr(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        sizes = base.shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
        self.factors = nnx.data(
            {
                leaf.removeprefix("factors."): base.zeros(linear, size, (None, None))
                for leaf, size in sizes.items()
            }
        )
        self.scale = base.constant(linear)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        values = {leaf: v.get_value().astype(x.dtype) for leaf, v in self.factors.items()}
        w1 = _whole(values, "w1") * self.scale.get_value().astype(x.dtype)
        w2 = _whole(values, "w2")
        # Blocks of features may cross the shards of the width.
        whole = constrained(x, TOKENS, linear.policy.mesh)
        grid = whole.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
        product = jnp.einsum("...mn,kn->...mk", grid, w2)
        product = jnp.einsum("...mk,lm->...lk", product, w1)
        product = product.reshape(*x.shape[:-1], -1)
        return linear.project(x) + constrained(product, TOKENS, linear.policy.mesh)

    def seed(self, key: jax.Array, index: int) -> None:
        """LoKr has no dropout."""


def _whole(values: Mapping[str, Any], name: str) -> Any:
    return values[name] if name in values else values[f"{name}_a"] @ values[f"{name}_b"]


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts a LoKr into the slots of the chosen layers."""
    base.fill_slots(model, adapters, LoKr)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of a factor or `scale` of one adapted layer, float32."""
    if leaf == "scale":
        return np.asarray(config.scale, np.float32)
    if leaf in ("factors.w1", "factors.w1_a"):
        return np.zeros(shape, np.float32)
    return base.kaiming(rng, shape, shape[1])


def tensors(config: Config, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    r = config.rank
    rows, columns = factors(d_out, config.decompose_factor), factors(d_in, config.decompose_factor)
    (l, k), (m, n) = rows, columns  # noqa: E741
    sizes: dict[str, tuple[int, ...]] = {}
    if config.decompose_both and r < max(l, m) / 2:
        sizes |= {"w1_a": (l, r), "w1_b": (r, m)}
    else:
        sizes |= {"w1": (l, m)}
    if r < max(k, n) / 2:
        sizes |= {"w2_a": (k, r), "w2_b": (r, n)}
    else:
        sizes |= {"w2": (k, n)}
    return {f"factors.{leaf}": Tensor(f"lokr_{leaf}", size, SAME) for leaf, size in sizes.items()}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """W + s kron(w1, w2)^T [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    values = {name.removeprefix("factors."): value for name, value in adapter.items()}
    return array + config.scale * np.kron(_whole(values, "w1"), _whole(values, "w2")).T


PEFT = Format(
    "LOKR",
    defaults={
        "alpha_pattern": {},
        "exclude_modules": None,
        "init_weights": True,
        "layers_pattern": None,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "rank_dropout": 0.0,
        "rank_dropout_scale": False,
        "rank_pattern": {},
        "use_effective_conv2d": False,
    },
    ignored=frozenset(
        ("init_weights", "layers_pattern", "module_dropout", "rank_dropout", "rank_dropout_scale")
        + ("use_effective_conv2d",)
    ),
)


def to_peft(config: Config, layers: Mapping[str, Config]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "r": config.rank,
        "alpha": plain(config.alpha),
        "decompose_both": config.decompose_both,
        "decompose_factor": config.decompose_factor,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    rank, alpha = fields.get("r"), fields.get("alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"r={rank!r}, alpha={alpha!r} are not numbers")
    return Config(
        rank=rank,
        alpha=float(alpha),
        decompose_both=bool(fields.get("decompose_both")),
        decompose_factor=fields.get("decompose_factor", -1),
    )
