"""The optimizer: a schedule and an optax chain from plain numbers.

    clip the global norm -> direction -> decoupled weight decay of matrices -> - learning rate

Optimizers differ in the direction only; `OPTIMIZERS` has one constructor for each. Parameters come
in stacks of layers, so a constructor gets the names of a parameter's trailing axes: what it does
with a matrix as a whole (blocks, rows and columns, norms, orthogonalisation) it does with each
layer's matrix by itself.

Bytes of state per trained parameter, of a matrix: adamw 8, adamw8bit 2.03, lion and muon 4,
adafactor 4 (D + F) / (D F), which is next to nothing.
"""

from collections.abc import Callable, Mapping

import optax

from jaxtune.optim.adafactor import scale_by_adafactor
from jaxtune.optim.adamw8bit import scale_by_adam8bit
from jaxtune.optim.muon import scale_by_muon
from jaxtune.optim.schedules import make_schedule
from jaxtune.schema import Optim

__all__ = ["OPTIMIZERS", "Axes", "make_optimizer", "make_schedule"]

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
    return scale_by_muon(
        *_decays(config, 0.95, 0.999), 0.9 if config.b1 is None else config.b1, config.eps, axes
    )


OPTIMIZERS: Mapping[str, Constructor] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _decays(config: Optim, b1: float, b2: float) -> tuple[float, float]:
    """The config's decay of both moments, or else the optimizer's own."""
    return (
        b1 if config.b1 is None else config.b1,
        b2 if config.b2 is None else config.b2,
    )


def make_optimizer(
    config: Optim, schedule: optax.Schedule, axes: Axes
) -> optax.GradientTransformation:
    """Clipping by global norm, then a row of `OPTIMIZERS` with decoupled weight decay.

    Decoupled: p <- p - learning_rate (direction + weight_decay p) (Loshchilov & Hutter 2017, arXiv
    1711.05101). Matrices decay; norms and biases do not.

    Args:
        config: numbers of the optimizer.
        schedule: learning rate by step.
        axes: of each parameter, by name.
    """
    step = optax.chain(
        OPTIMIZERS[config.name](config, axes),
        optax.add_decayed_weights(
            config.weight_decay, {name: len(names) >= 2 for name, names in axes.items()}
        ),
        optax.scale_by_learning_rate(schedule),
    )
    if not config.max_grad_norm:
        return step
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), step)
