"""Adaptive budget allocation (Zhang et al. 2023, arXiv 2303.10512).

    y = x W + s (dropout(x) A) diag(e) B        s = alpha / (R0 + 1e-5), R0 the rank at first

A [D_in, R], e [R] and B [R, D_out] stand for a singular value decomposition of the change. While
training, `optim.allocation` sets the least important e to zero, and the loss has a term that keeps
the columns of A and the rows of B orthogonal. A and B start normal with deviation 0.02 and e at
zero, so the model starts as the base. Source of the numbers: PEFT 0.21.2 (tuners/adalora).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import TRANSPOSE, Change
from jaxtune.nn.linear import Linear, linears
from jaxtune.nn.params import AdapterParam
from jaxtune.peft import base, lora, patterns
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.targets import Targets

_COLUMN = Change(lambda array: array[:, 0], lambda array: array[:, None])


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of AdaLoRA; those of the budget count while training."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target_rank: int = 8
    budget_start_steps: int = 0
    budget_final_steps: int = 0
    budget_every_steps: int = 1
    importance_b1: float = 0.85
    importance_b2: float = 0.85
    orthogonal_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Allocated(Config):
    """The knobs of an adapter that was read, with the triplets that it has.

    Attributes:
        kept: (name of a layer, which of its first triplets are left), of layers that lost some.
    """

    kept: tuple[tuple[str, tuple[bool, ...]], ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer's own knobs: which of its first triplets are left, and the scale."""

    kept: tuple[bool, ...]
    scale: float

    @property
    def rank(self) -> int:
        """How many are left."""
        return sum(self.kept)


READS = (Config, Targets, Saved, Biases)
APART = True


def configure(config: Config, layers: patterns.Layers) -> dict[str, Layer]:
    """The knobs of each layer."""
    kept = dict(config.kept) if isinstance(config, Allocated) else {}
    scale = (config.alpha or config.rank) / (config.rank + 1e-5)
    return {name: Layer(kept.get(name, (True,) * config.rank), scale) for name in layers}


class AdaLoRA(base.LowRank):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Layer | None], config: Config):
        self.dropout = config.dropout
        in_axis, out_axis = linear.axes
        sizes = base.shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
        self.a: AdapterParam = base.zeros(linear, sizes["a"], (in_axis, None))
        self.e: AdapterParam = base.zeros(linear, sizes["e"], (None,))
        self.b: AdapterParam = base.zeros(linear, sizes["b"], (None, out_axis))
        self.scale = base.constant(linear)
        self.key = nnx.data(None)

    def low_rank(self) -> tuple[jax.Array, jax.Array]:
        e = self.e.get_value() * self.scale.get_value()
        return self.a.get_value(), e[:, None] * self.b.get_value()


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts an AdaLoRA into the slots of the chosen layers."""
    base.fill_slots(model, adapters, AdaLoRA)


def initial(
    leaf: str, shape: tuple[int, ...], config: Layer, rng: np.random.Generator
) -> np.ndarray:
    """First value of `a`, `e`, `b` or `scale` of one adapted layer, float32."""
    if leaf == "scale":
        return np.asarray(config.scale, np.float32)
    if leaf == "e":
        return np.zeros(shape, np.float32)
    own = (shape[0], config.rank) if leaf == "a" else (config.rank, shape[1])
    return base.padded(rng.normal(0, 0.02, own).astype(np.float32), shape)


def triplets(adapters: base.Adapters) -> dict[str, np.ndarray]:
    """Name of every `e` -> which of its entries are triplets of an adapted layer.

    bool [n, R]; [R] outside the layers.
    """
    found = {}
    for path, configs in adapters.choice.items():
        size = max(config.rank for config in configs if config is not None)
        ranks = [0 if config is None else config.rank for config in configs]
        real = np.arange(size) < np.array(ranks)[:, None]
        found[f"{path}.adapter.e"] = real if path.startswith("layers.") else real[0]
    return found


def penalty(model: nnx.Module, config: Config) -> jax.Array:
    """The weighted mean, over all A and B, of the Frobenius norm of A^T A - I and of B B^T - I."""
    total, count = jnp.zeros(()), jnp.zeros(())
    for _, linear in linears(model):
        if isinstance(linear.adapter, AdaLoRA):
            a, b = linear.adapter.a.get_value(), linear.adapter.b.get_value()
            total += _apart(jnp.swapaxes(a, -1, -2)).sum() + _apart(b).sum()
            count += 2 * (linear.adapter.scale.get_value() != 0).sum()
    return config.orthogonal_weight * total / count


def _apart(rows: jax.Array) -> jax.Array:
    """The norm of rows rows^T - I, for each layer; rows of zeros are none, and no rows give 0."""
    gram = jnp.einsum("...rd,...sd->...rs", rows, rows, precision="highest")
    is_row = jnp.diagonal(gram, axis1=-2, axis2=-1) > 0
    squared = jnp.square(gram - jnp.eye(gram.shape[-1]) * is_row[..., None, :]).sum((-2, -1))
    some = squared > 0  # the root has no slope at 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1)), 0)


def trimmed(
    adapters: base.Adapters, params: Mapping[str, Any]
) -> tuple[base.Adapters, dict[str, Any]]:
    """The adapters without triplets whose e is zero, and the variables with the others in front.

    If all of a layer are, the first one stays; if all of all are, nothing was learnt and all stay.

    Args:
        adapters: what is attached.
        params: by name; the adapters' variables, host arrays, are changed.
    """
    es = {path: np.asarray(params[f"{path}.adapter.e"]) for path in adapters.choice}
    if not any(e.any() for e in es.values()):
        return adapters, dict(params)
    changed, choice = dict(params), {}
    for path, configs in adapters.choice.items():
        own = {leaf: np.array(params[f"{path}.adapter.{leaf}"]) for leaf in "aeb"}
        stacked = path.startswith("layers.")
        stacks = {leaf: array if stacked else array[None] for leaf, array in own.items()}  # views
        layers = list(configs)
        for index, config in enumerate(configs):
            if config is None:
                continue
            left = stacks["e"][index][: config.rank] != 0
            left[0] |= not left.any()
            rest = np.flatnonzero(left)
            for leaf, axis in (("a", 1), ("e", 0), ("b", 0)):
                array = stacks[leaf][index]
                stacks[leaf][index] = base.padded(np.take(array, rest, axis), array.shape)
            kept = np.array(config.kept)
            kept[kept] = left
            layers[index] = dataclasses.replace(config, kept=tuple(kept.tolist()))
        choice[path] = tuple(layers)
        changed |= {f"{path}.adapter.{leaf}": array for leaf, array in own.items()}
    return dataclasses.replace(adapters, choice=choice), changed


def tensors(config: Layer, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    return {
        "a": Tensor("lora_A", (d_in, config.rank), TRANSPOSE),
        "e": Tensor("lora_E", (config.rank,), _COLUMN),
        "b": Tensor("lora_B", (config.rank, d_out), TRANSPOSE),
    }


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Layer
) -> np.ndarray:
    """W + s A diag(e) B [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    return array + config.scale * ((adapter["a"] * adapter["e"]) @ adapter["b"])


PEFT = Format(
    "ADALORA",
    defaults={
        **lora.PEFT.defaults,
        "alpha_pattern": {},
        "lora_bias": False,
        "r": 8,
        "trainable_token_indices": None,
        "use_rslora": False,
    },
    ignored=lora.PEFT.ignored | {"r", "total_step"},
    accepted={"init_lora_weights": (True, False, None)},
)
_FIELDS = {
    "init_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_r": "target_rank",
    "tinit": "budget_start_steps",
    "tfinal": "budget_final_steps",
    "deltaT": "budget_every_steps",
    "beta1": "importance_b1",
    "beta2": "importance_b2",
    "orth_reg_weight": "orthogonal_weight",
}


def to_peft(config: Config, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    some = any(not all(own.kept) for own in layers.values())
    kept = {f"{name}.lora_E": list(own.kept) for name, own in layers.items()}
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    return {
        **fields,
        "lora_alpha": patterns.plain(config.alpha),
        "rank_pattern": kept if some else None,
        # PEFT asks for a number above these two; it says nothing about a trained adapter.
        "total_step": config.budget_start_steps + config.budget_final_steps + 1,
    }


def from_peft(fields: Mapping[str, Any]) -> Allocated:
    """The knobs that `to_peft` writes; ValueError if they are no numbers."""
    values = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if theirs in fields}
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError(f"{', '.join(_FIELDS)} are not all numbers")
    rank = values.setdefault("rank", 12)
    kept = tuple(
        (name.removesuffix(".lora_E"), tuple(map(bool, np.ravel(flags))))
        for name, flags in (fields.get("rank_pattern") or {}).items()
    )
    if type(rank) is not int or rank < 1 or any(len(flags) != rank for _, flags in kept):
        raise ValueError(f"init_r={rank!r} and rank_pattern are not lists of so many")
    values |= {"alpha": float(values.get("alpha", 8))}
    return Allocated(**values, kept=kept)
