import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.optim import OPTIMIZERS, make_optimizer, make_schedule
from jaxtune.optim.apply import apply_by_layer, apply_whole
from jaxtune.schema import Optim
from tests import tolerances
from tests.optim.paths import (
    AXES,
    assert_same_path,
    constant,
    each_layer,
    random_tree,
    train,
    train_torch,
)
from tests.oracle import difference


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(name: str, warmup: int):
    import torch
    import transformers

    steps, parameter = 12, torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.2)
    if name == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(sgd, warmup)
    else:
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        theirs = make(sgd, warmup, steps)
    ours = make_schedule(Optim(learning_rate=0.2, schedule=name, warmup_steps=warmup), steps)
    for step in range(steps + 1):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-7), step
        sgd.step()
        theirs.step()


def test_warmup_ratio_and_least_rate():
    numbers = {"learning_rate": 0.2, "warmup_ratio": 0.25, "min_lr_ratio": 0.1}
    for name in ("linear", "cosine"):
        schedule = make_schedule(Optim(schedule=name, **numbers), 20)
        got = [float(schedule(step)) for step in (0, 5, 20, 30)]
        assert got == pytest.approx([0.0, 0.2, 0.02, 0.02]), name


def test_schedule_of_one_step():
    for name in ("linear", "cosine", "constant"):
        assert float(make_schedule(Optim(learning_rate=0.2, schedule=name), 1)(0)) == pytest.approx(
            0.2
        )


def gradients(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    scale = 10.0 if step % 2 else 0.1  # clipped and not clipped
    shapes = {"matrix": (5, 4), "bias": (4,)}
    return {k: (scale * random.normal(size=s)).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("max_grad_norm", [1.5, 0.0])
def test_adamw_and_clipping_are_those_of_torch(max_grad_norm: float):
    import torch

    numbers = Optim(
        **{"learning_rate": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-6},
        **{"weight_decay": 0.2, "max_grad_norm": max_grad_norm, "schedule": "constant"},
    )
    start = gradients(100)
    theirs = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    groups: list[dict[str, Any]] = [
        {"params": [theirs["matrix"]], "weight_decay": 0.2},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    axes = {"matrix": ("embed", "mlp"), "bias": ("mlp",)}
    tx = make_optimizer(numbers, make_schedule(numbers, 10), axes)
    ours: Any = jax.tree.map(jnp.asarray, start)
    state = tx.init(ours)
    for step in range(10):
        grads = gradients(step)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_grad_norm)
        adamw.step()
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            assert difference(ours[name], parameter.detach().numpy()) <= 2e-6, (step, name)


def test_adafactor_is_transformers():
    from transformers.optimization import Adafactor

    numbers = constant("adafactor", max_grad_norm=0.0)

    def make(params: list, weight_decay: float) -> Any:
        fixed = {"scale_parameter": False, "relative_step": False}
        return Adafactor(params, lr=0.02, weight_decay=weight_decay, **fixed)

    assert_same_path(train(numbers), train_torch(make, numbers), tolerances.OPS)


def test_lion_is_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    numbers = constant("lion", learning_rate=0.003)

    def make(params: list, weight_decay: float) -> Any:
        return bitsandbytes.optim.Lion(params, lr=0.003, weight_decay=weight_decay)

    assert_same_path(train(numbers), train_torch(make, numbers), tolerances.OPS)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """The quintic Newton-Schulz iteration as published, in float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_makes_each_layer_orthogonal_and_adamw_does_the_rest():
    numbers = constant("muon", max_grad_norm=0.0)
    got, adamw = train(numbers), train(constant("adamw", max_grad_norm=0.0))
    params = {k: v.astype(np.float64) for k, v in each_layer(random_tree(99)).items()}
    momentum = {name: np.zeros_like(array) for name, array in params.items()}
    for step in range(20):
        for name, grad in each_layer(random_tree(step, 0.3 + step % 3)).items():
            if "kernel" not in name:
                assert difference(got[step][name], adamw[step][name]) <= tolerances.OPS
                continue
            momentum[name] = 0.95 * momentum[name] + 0.05 * grad
            ahead = 0.95 * momentum[name] / (1 - 0.95 ** (step + 2))
            update = orthogonal(ahead + 0.05 * grad / (1 - 0.95 ** (step + 1)))
            values = np.linalg.svd(update, compute_uv=False)
            assert 0.4 < values.min() and values.max() < 1.3
            update *= 0.2 * np.sqrt(max(update.shape))
            params[name] -= 0.02 * (update + 0.1 * params[name])
            assert difference(got[step][name], params[name]) <= 1e-5, (step, name)


def test_muon_begins_as_torch_does():
    """Later steps differ: torch does not correct the momentum for its start at 0."""
    import torch

    def make(params: list, weight_decay: float) -> Any:
        numbers: dict[str, Any] = {"lr": 0.02, "weight_decay": weight_decay}
        if params[0].ndim == 1:
            return torch.optim.AdamW(params, **numbers)
        return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **numbers)

    numbers = constant("muon", max_grad_norm=0.0)
    (ours,), (theirs,) = train(numbers, 1), train_torch(make, numbers, 1)
    start = each_layer(random_tree(99))
    for name in (name for name in ours if "kernel" in name):
        change = difference(ours[name] - start[name], theirs[name] - start[name])
        assert change <= 3e-2, name  # torch iterates in bfloat16


SLOW = ("galore8bit", "apollo")  # their parts are those of adamw8bit, galore and apollo_mini


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in sorted(OPTIMIZERS)],
)
def test_parameters_one_by_one_are_parameters_at_once(name: str, stages: int):
    numbers = constant(name)
    tx = make_optimizer(numbers, make_schedule(numbers, 10), AXES)
    params = random_tree(99)
    whole = by_layer = (params, tx.init(params))
    apply = jax.jit(functools.partial(apply_whole, tx))
    options = {"axes": AXES, "host": False, "stages": stages}
    apart = jax.jit(functools.partial(apply_by_layer, tx, **options))
    for step in range(4):
        grads = random_tree(step)
        norm = optax.tree.norm(grads)
        whole = apply(grads, *whole, step != 2, norm)
        by_layer = apart(grads, *by_layer, step != 2, norm)
        assert jax.tree.structure(whole) == jax.tree.structure(by_layer)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(by_layer), strict=True):
            assert a.dtype == b.dtype and difference(a, b) <= tolerances.OPS
