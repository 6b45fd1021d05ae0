"""GaLore and APOLLO: an optimizer's moments are those of a projected gradient.

The gradient G [D, F] of a layer's kernel is projected along its shorter axis, of size S (the input
axis D if both are equal), onto R directions, and an inner optimizer (Adam) sees the result, [R, F]
or [D, R]. Vectors and vocabulary tables go to the inner optimizer as they are.

GaLore (Zhao et al. 2024, arXiv 2403.03507) projects onto the gradient's first singular vectors, the
basis P [S, R], and brings Adam's direction back:  scale * P adam(P^T G).  Moments are kept when the
basis changes. APOLLO (Zhu et al. 2024, arXiv 2412.05270) only learns from a random projection how
much Adam would have scaled each channel of the longer axis, or the whole matrix (APOLLO-Mini), and
scales G itself. The numbers are those of galore-torch 1.0 and apollo-torch 1.0.3, except that Adam
adds eps after the correction of its moments, and weight decay sees the parameter before the step.
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.optim.groups import is_kernel
from jaxtune.tree import Params

MAX_GROWTH = 1.01  # of a direction's norm from step to step, in APOLLO
EPS = 1e-8  # added to norms that are divided by

Axes = Mapping[str, tuple[str | None, ...]]


class GaLoreState(NamedTuple):
    """What GaLore keeps.

    Attributes:
        count: int32, applied steps.
        basis: of kernels, [..., S, R] with orthonormal columns.
        inner: the inner optimizer's state, of projected gradients.
    """

    count: jax.Array
    basis: Params
    inner: Any


class ApolloState(NamedTuple):
    """What APOLLO keeps.

    Attributes:
        count: int32, applied steps.
        norm: of kernels, [..., 1, 1], the norm of the last direction; 0 before the first.
        inner: the inner optimizer's state, of projected gradients.
    """

    count: jax.Array
    norm: Params
    inner: Any


def scale_by_galore(
    inner: optax.GradientTransformation, axes: Axes, *, rank: int, gap: int, scale: float
) -> optax.GradientTransformation:
    """The inner optimizer's direction for a gradient of low rank, brought back.

    Args:
        inner: what makes a direction of a gradient.
        axes: names of the trailing axes of each parameter.
        rank: directions that are kept, at most S.
        gap: steps after which the basis is that of the current gradient again.
        scale: factor of the direction.
    """

    def init(params: Params) -> GaLoreState:
        basis = {
            name: jnp.zeros((*p.shape[:-2], *_basis_shape(p.shape, rank)))
            for name, p in params.items()
            if is_kernel(axes[name])
        }
        return GaLoreState(jnp.zeros((), jnp.int32), basis, inner.init(_projected(params, basis)))

    def update(
        grads: Params, state: GaLoreState, params: Params | None = None
    ) -> tuple[Params, GaLoreState]:
        def refreshed() -> Params:
            return {name: _singular(grads[name], rank) for name in state.basis}

        basis = jax.lax.cond(state.count % gap == 0, refreshed, lambda: state.basis)
        low: Any
        low, inner_state = inner.update(_projected(grads, basis), state.inner)
        updates = dict(low)
        for name, columns in basis.items():
            rows = low[name] if _is_wide(grads[name].shape) else low[name].mT
            full = _product(columns, rows)
            updates[name] = scale * (full if _is_wide(grads[name].shape) else full.mT)
        return updates, GaLoreState(state.count + 1, basis, inner_state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def scale_by_apollo(
    decays: tuple[float, float],
    eps: float,
    axes: Axes,
    *,
    rank: int,
    gap: int,
    scale: float,
    by_channel: bool,
) -> optax.GradientTransformation:
    """The gradient, scaled as Adam would scale its random projection.

    The projection has independent normal elements of variance 1 / R. It is made anew from the
    parameter's name and the number of refreshes, so it is not kept; all layers have the same.

    Args:
        decays, eps: of Adam.
        axes: names of the trailing axes of each parameter.
        rank: directions that are kept, at most S.
        gap: steps after which there is another projection.
        scale: directions are multiplied with its root.
        by_channel: a factor for each index of the longer axis; false: one for the whole matrix.
    """
    inner = optax.scale_by_adam(*decays, eps)

    def basis(grads: Params, refreshes: jax.Array | int) -> Params:
        return {
            name: random_projection(name, refreshes, _basis_shape(grad.shape, rank))
            for name, grad in grads.items()
            if is_kernel(axes[name])
        }

    def init(params: Params) -> ApolloState:
        projections = basis(params, 0)
        norms = {name: jnp.zeros((*params[name].shape[:-2], 1, 1)) for name in projections}
        low = inner.init(_projected(params, projections))
        return ApolloState(jnp.zeros((), jnp.int32), norms, low)

    def update(
        grads: Params, state: ApolloState, params: Params | None = None
    ) -> tuple[Params, ApolloState]:
        low = _projected(grads, basis(grads, state.count // gap))
        directions: Any
        directions, inner_state = inner.update(low, state.inner)
        count = state.count + 1
        b1, b2 = (1 - decay ** count.astype(jnp.float32) for decay in decays)
        correction = jnp.sqrt(b2) / b1  # the limit holds for directions without it
        updates, norms = dict(directions), {}
        for name, old in state.norm.items():
            grad = grads[name]
            over = ((-2,) if _is_wide(grad.shape) else (-1,)) if by_channel else (-2, -1)
            size = _norm(directions[name], over) / correction
            scaled = grad * (size / (_norm(low[name], over) + EPS))
            norm = _norm(scaled, (-2, -1))
            growth = jnp.where(old > 0, norm / (old + EPS), 0.0)
            limit = jnp.maximum(growth, MAX_GROWTH) / MAX_GROWTH
            norms[name] = norm / limit
            updates[name] = scaled * (math.sqrt(scale) * correction / limit)
        return updates, ApolloState(count, norms, inner_state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _is_wide(shape: tuple[int, ...]) -> bool:
    """Whether the shorter axis is the first of the last two."""
    return shape[-2] <= shape[-1]


def _basis_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    shorter = min(shape[-2:])
    return shorter, min(rank, shorter)


def _projected(grads: Params, basis: Params) -> Params:
    """Gradients with those of kernels replaced by P^T G [R, F], or G P [D, R]."""
    low = dict(grads)
    for name, columns in basis.items():
        wide = _is_wide(grads[name].shape)
        low[name] = _product(columns.mT, grads[name]) if wide else _product(grads[name], columns)
    return low


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")  # a TPU would round the factors to bfloat16


def _singular(grad: jax.Array, rank: int) -> jax.Array:
    """The first singular vectors of the shorter side, [..., S, R]."""
    left, _, right = jnp.linalg.svd(grad, full_matrices=False)
    columns = left if _is_wide(grad.shape) else right.mT
    return columns[..., :rank]


def random_projection(name: str, refreshes: jax.Array | int, shape: tuple[int, int]) -> jax.Array:
    """Normal elements of variance 1 / R, [S, R]; the same for a layer in whatever stack it is.

    Args:
        name: of the parameter, and with `refreshes` the seed.
        refreshes: projections that there were before.
        shape: (S, R).
    """
    # The number of a stack says how the model is laid out, not which layer it is.
    layer = re.sub(r"^layers\.\d+\.", "layers.", name)
    key = jax.random.fold_in(jax.random.key(zlib.crc32(layer.encode())), refreshes)
    return jax.random.normal(key, shape) / math.sqrt(shape[1])


def _norm(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum(over, keepdims=True))
