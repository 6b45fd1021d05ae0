"""The optimizer: a schedule and an optax chain from plain numbers.

    clip the global norm -> direction -> decoupled weight decay of matrices -> - learning rate

Optimizers differ in the direction only; `OPTIMIZERS` has one constructor for each. Parameters come
in stacks of layers, so a constructor gets the names of a parameter's trailing axes: what it does
with a matrix as a whole (blocks, rows and columns, norms, orthogonalisation) it does with each
layer's matrix by itself.

Bytes of state per trained parameter of a kernel: adamw 8, adamw8bit 2.03, lion and muon 4,
adafactor 4 (D + F) / (D F), which is next to nothing; with S the shorter and X the longer axis of a
kernel, galore 8 R / S + 4 R / X, galore8bit 2.03 R / S + 4 R / X, apollo 8 R / S.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.optim.adafactor import scale_by_adafactor
from jaxtune.optim.adamw8bit import scale_by_adam8bit
from jaxtune.optim.allocation import Allocation, allocate, cubic
from jaxtune.optim.apply import Apply, apply_by_layer, apply_whole
from jaxtune.optim.balance import balance
from jaxtune.optim.groups import rate_factors
from jaxtune.optim.low_rank import scale_by_apollo, scale_by_galore
from jaxtune.optim.muon import scale_by_muon
from jaxtune.optim.restart import restart
from jaxtune.optim.schedules import make_schedule
from jaxtune.schema import Optim

__all__ = [
    "OPTIMIZERS",
    "Allocation",
    "Apply",
    "Axes",
    "apply_whole",
    "balance",
    "cubic",
    "make_apply",
    "make_optimizer",
    "make_schedule",
]

# Names of the trailing axes of each trained parameter; leading axes are stacks of layers.
Axes = Mapping[str, tuple[str | None, ...]]
Constructor = Callable[[Optim, Axes], optax.GradientTransformation]


def _adamw(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return optax.scale_by_adam(*_decays(config, 0.9, 0.999), config.eps)


def _adamw8bit(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return scale_by_adam8bit(*_decays(config, 0.9, 0.999), config.eps, axes)


def _adafactor(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return scale_by_adafactor(axes)


def _lion(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return optax.scale_by_lion(*_decays(config, 0.9, 0.99))


def _muon(config: Optim, axes: Axes) -> optax.GradientTransformation:
    momentum, _ = _decays(config, 0.95, 0.999)
    return scale_by_muon(momentum, *_decays(config, 0.9, 0.999), config.eps, axes)


def _galore(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return scale_by_galore(_adamw(config, axes), axes, **_projection(config, 128, 0.25))


def _galore8bit(config: Optim, axes: Axes) -> optax.GradientTransformation:
    return scale_by_galore(_adamw8bit(config, axes), axes, **_projection(config, 128, 0.25))


def _apollo(config: Optim, axes: Axes) -> optax.GradientTransformation:
    numbers = _projection(config, 128, 1.0)
    return scale_by_apollo(
        _decays(config, 0.9, 0.999), config.eps, axes, **numbers, by_channel=True
    )


def _apollo_mini(config: Optim, axes: Axes) -> optax.GradientTransformation:
    numbers = _projection(config, 1, 128.0)
    return scale_by_apollo(
        _decays(config, 0.9, 0.999), config.eps, axes, **numbers, by_channel=False
    )


def _projection(config: Optim, rank: int, scale: float) -> dict[str, Any]:
    """The config's numbers of a projection, or else the optimizer's own."""
    return {
        "rank": rank if config.projection_rank is None else config.projection_rank,
        "gap": config.projection_gap,
        "scale": scale if config.projection_scale is None else config.projection_scale,
    }


OPTIMIZERS: Mapping[str, Constructor] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "galore": _galore,
    "galore8bit": _galore8bit,
    "apollo": _apollo,
    "apollo_mini": _apollo_mini,
}

# Not elementwise: the intermediate values of all layers at once take more memory than is saved.
BY_LAYER = ("adamw8bit", "muon", "galore", "galore8bit", "apollo", "apollo_mini")


def _decays(config: Optim, b1: float, b2: float) -> tuple[float, float]:
    """The config's decay of both moments, or else the optimizer's own."""
    return (
        b1 if config.b1 is None else config.b1,
        b2 if config.b2 is None else config.b2,
    )


def make_optimizer(
    config: Optim,
    schedule: optax.Schedule,
    axes: Axes,
    *,
    restarted: Collection[str] = (),
    every: int = 1,
    allocation: Allocation | None = None,
) -> optax.GradientTransformation:
    """Clipping by global norm, then a row of `OPTIMIZERS` with decoupled weight decay.

    Decoupled: p <- p - learning_rate (direction + weight_decay p) (Loshchilov & Hutter 2017, arXiv
    1711.05101). Matrices decay; norms and biases do not.

    Args:
        config: numbers of the optimizer.
        schedule: learning rate by step.
        axes: of each parameter, by name.
        restarted: parameters whose direction begins anew, because they are those of other layers.
        every: steps after which that happens.
        allocation: parameters of which the least important are zeroed.
    """
    direction = OPTIMIZERS[config.name](config, axes)
    if restarted:
        direction = restart(direction, restarted, every)

    def is_matrix(params: Any) -> dict[str, bool]:
        return {name: len(axes[name]) >= 2 for name in params}

    parts = [
        direction,
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(schedule),
    ]
    factors = rate_factors(config, axes)
    if factors:
        parts.append(optax.stateless(lambda updates, _: _scaled(updates, factors)))
    step = optax.chain(*parts)
    if allocation is not None:
        step = allocate(step, allocation)
    if not config.max_grad_norm:
        return step
    return optax.chain(_clip(config.max_grad_norm), step)


def _scaled(updates: Any, factors: Mapping[str, float]) -> Any:
    return {name: update * factors.get(name, 1.0) for name, update in updates.items()}


def make_apply(config: Optim, axes: Axes, stages: int = 1) -> Apply:
    """How a step of the optimizer is taken: all at once, or layer by layer of every stage."""
    if not config.offload and config.name not in BY_LAYER:
        return apply_whole
    return functools.partial(apply_by_layer, axes=axes, host=config.offload, stages=stages)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which is told the norm when it gets a part of the gradients."""

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **unused: Any
    ) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        clipped = jax.tree.map(
            lambda u: jnp.where(norm < max_norm, u, u / norm.astype(u.dtype) * max_norm), updates
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
