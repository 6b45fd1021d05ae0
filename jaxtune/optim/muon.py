"""Muon: momentum whose singular values are all made about 1.

Jordan 2024, https://kellerjordan.github.io/posts/muon, as in optax 0.2.8; the result is scaled to
the usual root mean square of AdamW's, 0.2 (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that
AdamW's learning rates and weight decay fit.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as scale_by_orthogonal

from jaxtune.optim.groups import is_kernel

ADAMW_RMS = 0.2


def scale_by_muon(
    momentum: float,
    b1: float,
    b2: float,
    eps: float,
    axes: Mapping[str, tuple[str | None, ...]],
) -> optax.GradientTransformation:
    """Muon for the matrices, each layer's by itself; Adam for vectors, tables and scores.

    Args:
        momentum: of matrices.
        b1, b2, eps: of Adam.
        axes: names of the trailing axes of each parameter.
    """
    matrices = optax.chain(
        scale_by_orthogonal(beta=momentum, weight_dimension_numbers=_last_two),
        optax.stateless(lambda updates, params: jax.tree.map(_scaled, updates)),
    )
    return optax.partition(
        {"muon": matrices, "adam": optax.scale_by_adam(b1, b2, eps)},
        lambda params: {name: "muon" if is_kernel(axes[name]) else "adam" for name in params},
    )


def _last_two(updates: Any) -> Any:
    """[..., D, F]: all axes but the last two count layers."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)


def _scaled(update: jax.Array) -> jax.Array:
    """An orthogonal [D, F] has root mean square 1 / sqrt(max(D, F))."""
    return ADAMW_RMS * math.sqrt(max(update.shape[-2:])) * update
