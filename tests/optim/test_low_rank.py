"""GaLore and APOLLO against their published steps, written out for Hugging Face's layout."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtune.optim import OPTIMIZERS, make_optimizer, make_schedule
from jaxtune.optim.low_rank import random_projection
from jaxtune.schema import Optim
from jaxtune.sharding.mesh import make_mesh
from jaxtune.sharding.rules import sharding
from tests import tolerances
from tests.optim.paths import AXES, SHAPES, constant, each_layer, random_tree
from tests.oracle import difference

STEPS, GAP, B1, B2 = 12, 4, 0.9, 0.999
# A wide, a tall and a square matrix; 3 is not a divisor of anything.
MATRICES = {
    "layers.0.up.kernel": ("embed", "mlp"),
    "layers.0.down.kernel": ("mlp", "embed"),
    "layers.0.o_proj.kernel": ("heads", "embed"),
}
ALL_AXES = AXES | MATRICES
ALL_SHAPES = SHAPES | {"layers.0.down.kernel": (2, 20, 12), "layers.0.o_proj.kernel": (2, 12, 12)}


def tree(seed: int) -> Any:
    return random_tree(seed, 0.3 + seed % 3, ALL_SHAPES)


def run(numbers: Optim) -> tuple[list[dict[str, np.ndarray]], list[Any]]:
    """Parameters and the optimizer's state after each step."""
    tx = make_optimizer(numbers, make_schedule(numbers, STEPS), ALL_AXES)
    params, update = tree(99), jax.jit(tx.update)
    state, history, states = tx.init(params), [], []
    for step in range(STEPS):
        updates, state = update(tree(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(each_layer(params, ALL_AXES))
        states.append(state[0])
    return history, states


class Adam:
    """Moments of one matrix in float64; `step` gives the direction without its correction."""

    def __init__(self) -> None:
        self.m = self.v = np.zeros(())

    def step(self, grad: np.ndarray) -> np.ndarray:
        self.m = B1 * self.m + (1 - B1) * grad
        self.v = B2 * self.v + (1 - B2) * grad**2
        return self.m / (np.sqrt(self.v) + 1e-12)


def corrected(t: int) -> float:
    return np.sqrt(1 - B2**t) / (1 - B1**t)


def projected(grad: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Hugging Face's [out, in], whose longer side is kept; basis [shorter, R]."""
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.T @ grad


@pytest.mark.parametrize("rank", [3, 64])
def test_galore(rank: int):
    adam = {"max_grad_norm": 0.0, "eps": 1e-12}
    projection = {"projection_rank": rank, "projection_gap": GAP, "projection_scale": 0.5}
    got, states = run(constant("galore", **adam, **projection))
    adamw, _ = run(constant("adamw", **adam))
    params = {k: v.astype(np.float64) for k, v in each_layer(tree(99), ALL_AXES).items()}
    moments = {name: Adam() for name in params}
    for step in range(STEPS):
        bases = each_layer(states[step].basis, ALL_AXES)
        grads = each_layer(tree(step), ALL_AXES)
        for name, grad in grads.items():
            if "kernel" not in name:
                assert difference(got[step][name], adamw[step][name]) <= tolerances.OPS
                continue
            # The signs of singular vectors are LAPACK's choice, so the basis is ours.
            basis, full, hf = bases[name], grad.astype(np.float64).T, params[name].T
            if step % GAP == 0:
                values = np.linalg.svd(full, compute_uv=False)[:rank]
                size = np.linalg.norm(projected(full, basis))
                assert size == pytest.approx(np.linalg.norm(values), rel=1e-5)
                assert difference(basis.T @ basis, np.eye(basis.shape[1])) <= 1e-5
            low = moments[name].step(projected(full, basis))
            back = low @ basis.T if full.shape[0] >= full.shape[1] else basis @ low
            decay = 0.02 * 0.1 * hf
            params[name] = (hf - 0.02 * corrected(step + 1) * 0.5 * back - decay).T
            assert difference(got[step][name], params[name]) <= 1e-5, (step, name)


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_apollo(name: str):
    rank = {"apollo": 3, "apollo_mini": 1}[name]
    scale = {"apollo": 1.0, "apollo_mini": 128.0}[name]
    given = {} if name == "apollo_mini" else {"projection_rank": rank}
    got, _ = run(constant(name, max_grad_norm=0.0, eps=1e-12, projection_gap=GAP, **given))
    params = {k: v.astype(np.float64) for k, v in each_layer(tree(99), ALL_AXES).items()}
    moments, last, limited = {name: Adam() for name in params}, {}, 0
    for step in range(STEPS):
        for key, grad in each_layer(tree(step), ALL_AXES).items():
            if "kernel" not in key:
                continue
            full, hf = grad.astype(np.float64).T, params[key].T
            size = min(full.shape), rank
            basis = np.asarray(random_projection(key.split()[0], step // GAP, size), np.float64)
            low = projected(full, basis)
            direction = moments[key].step(low)
            tall = full.shape[0] >= full.shape[1]
            axis = None if name == "apollo_mini" else (1 if tall else 0)
            factor = np.linalg.norm(direction, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)
            scaled = full * (factor[:, None] if axis == 1 else factor)
            if key in last:
                limit = max(np.linalg.norm(scaled) / (last[key] + 1e-8), 1.01) / 1.01
                limited += limit > 1
                scaled = scaled / limit
            last[key] = np.linalg.norm(scaled)
            step_size = 0.02 * corrected(step + 1) * np.sqrt(scale)
            params[key] = (hf - step_size * scaled - 0.02 * 0.1 * hf).T
            assert difference(got[step][key], params[key]) <= 1e-5, (step, key)
    assert limited, "the limit of growth was never reached"


def test_no_moment_of_full_rank_is_kept():
    for name in sorted(set(OPTIMIZERS) & {"galore", "galore8bit", "apollo", "apollo_mini"}):
        numbers = constant(name, projection_rank=3)
        tx = make_optimizer(numbers, make_schedule(numbers, STEPS), ALL_AXES)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, tree(0))):
            named = [key.key for key in path if getattr(key, "key", None) in MATRICES]
            for kernel in named:
                assert leaf.size <= 3 * leaf.shape[0] * max(ALL_SHAPES[kernel]), path


def test_galore8bit_rounds_the_moments_of_galore():
    """Projected moments of 4096 elements or more are in blocks of 256."""
    axes = {"layers.0.up.kernel": ("embed", "mlp")}
    random = np.random.default_rng(0)
    grads = [{n: random.normal(size=(1, 48, 4096)).astype(np.float32) for n in axes} for _ in "123"]
    ends = []
    for name in ("galore", "galore8bit"):
        numbers = constant(name, projection_rank=4, max_grad_norm=0.0)
        tx = make_optimizer(numbers, make_schedule(numbers, STEPS), axes)
        state = tx.init(grads[0])
        for grad in grads:
            updates, state = jax.jit(tx.update)(grad, state, grads[0])
        ends.append((np.asarray(updates["layers.0.up.kernel"]), state))
    assert ends[1][1][0].inner.m["layers.0.up.kernel"].dtype == np.uint8
    assert 0 < difference(ends[1][0], ends[0][0]) <= 0.1


def test_projections_are_those_of_the_layer_in_any_stack_and_change():
    shape = (40, 8)
    first = np.asarray(random_projection("layers.0.up.kernel", 0, shape))
    assert (first == np.asarray(random_projection("layers.7.up.kernel", 0, shape))).all()
    assert (first != np.asarray(random_projection("layers.0.down.kernel", 0, shape))).all()
    assert (first != np.asarray(random_projection("layers.0.up.kernel", 1, shape))).all()
    assert np.var(first) == pytest.approx(1 / 8, rel=0.2)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_a_kernel_on_eight_devices_is_one_on_one(name: str):
    kernel, axes = "layers.0.up.kernel", {"layers.0.up.kernel": ("embed", "mlp")}
    mesh, numbers = (
        make_mesh({"data": 1, "fsdp": 4, "tensor": 2}),
        constant(name, projection_rank=4),
    )
    tx, random, ends = make_optimizer(numbers, make_schedule(numbers, 9), axes), {}, []
    for seed in range(3):
        random[seed] = np.random.default_rng(seed).normal(size=(2, 16, 24)).astype(np.float32)
    for spread in (False, True):
        where = sharding((2, 16, 24), axes[kernel], mesh) if spread else None
        arrays = {seed: {kernel: jax.device_put(x, where)} for seed, x in random.items()}
        update, params = jax.jit(tx.update), arrays[0]
        state = tx.init(params)
        for seed in arrays:
            updates, state = update(arrays[seed], state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params[kernel])
    assert not ends[1].sharding.is_fully_replicated
    assert difference(ends[1], ends[0]) <= tolerances.SHARDED
