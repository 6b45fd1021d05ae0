"""Adafactor: a second moment kept as its means over rows and over columns.

Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4 with an explicit learning rate: no scaling by
the size of parameters and no first moment, as transformers 5.23's `Adafactor(scale_parameter=False,
relative_step=False)`, which is its Trainer's `optim="adafactor"`. optax 0.2.8's factors the two
*largest* axes and clips a leaf as a whole, which for a stack of layers would mix them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.tree import Params

EPS = 1e-30  # added to squared gradients
DECAY = 0.8  # step t forgets 1 - t^-0.8 of the second moment
MAX_RMS = 1.0  # of a layer's direction


class AdafactorState(NamedTuple):
    """Means of squared gradients.

    Attributes:
        count: int32, applied steps.
        rows: of matrices [..., D, F]: [..., D, 1].
        columns: of matrices: [..., 1, F].
        whole: of vectors, every square.
    """

    count: jax.Array
    rows: Params
    columns: Params
    whole: Params


def scale_by_adafactor(
    axes: Mapping[str, tuple[str | None, ...]],
) -> optax.GradientTransformation:
    """Gradient over the root of its factored second moment, clipped to a root mean square of 1.

    Args:
        axes: names of the trailing axes of each parameter; with two or more it is a matrix.
    """
    matrices = {name for name, names in axes.items() if len(names) >= 2}

    def init(params: Params) -> AdafactorState:
        return AdafactorState(
            jnp.zeros((), jnp.int32),
            {n: jnp.zeros_like(p[..., :1]) for n, p in params.items() if n in matrices},
            {n: jnp.zeros_like(p[..., :1, :]) for n, p in params.items() if n in matrices},
            {n: jnp.zeros_like(p) for n, p in params.items() if n not in matrices},
        )

    def update(
        grads: Params, state: AdafactorState, params: Params | None = None
    ) -> tuple[Params, AdafactorState]:
        count = state.count + 1
        keep = 1 - count.astype(jnp.float32) ** -DECAY
        squares = {name: jnp.square(grad) + EPS for name, grad in grads.items()}

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            return keep * old + (1 - keep) * new

        rows = {n: mean(r, squares[n].mean(-1, keepdims=True)) for n, r in state.rows.items()}
        columns = {n: mean(c, squares[n].mean(-2, keepdims=True)) for n, c in state.columns.items()}
        whole = {n: mean(w, squares[n]) for n, w in state.whole.items()}
        updates = {}
        for name, grad in grads.items():
            if name in matrices:
                share = rows[name] / rows[name].mean(-2, keepdims=True)
                direction = grad * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns[name])
            else:
                direction = grad * jax.lax.rsqrt(whole[name])
            updates[name] = _clipped(direction, len(axes[name]))
        return updates, AdafactorState(count, rows, columns, whole)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _clipped(direction: jax.Array, rank: int) -> jax.Array:
    """Each layer's trailing `rank` axes scaled down to a root mean square of at most 1."""
    layer = tuple(range(direction.ndim - rank, direction.ndim))
    rms = jnp.sqrt(jnp.square(direction).mean(layer, keepdims=True))
    return direction / jnp.maximum(1.0, rms / MAX_RMS)
