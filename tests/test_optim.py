from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.schema import Optim
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
