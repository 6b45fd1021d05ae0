"""Optimizers on random gradients of a small tree, step by step, beside torch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.schema import Optim
from tests.oracle import difference

# Two layers of a matrix and of a vector, and a table.
AXES = {
    "layers.0.up.kernel": ("embed", "mlp"),
    "layers.0.up.bias": ("mlp",),
    "embed.table": ("vocab", "embed"),
}
SHAPES = {"layers.0.up.kernel": (2, 12, 20), "layers.0.up.bias": (2, 20), "embed.table": (30, 12)}


def random_tree(seed: int, scale: float = 1.0, shapes: Any = SHAPES) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def each_layer(tree: Any, axes: Any = AXES) -> dict[str, np.ndarray]:
    """Every layer's array by itself."""
    arrays = {}
    for name, array in tree.items():
        stack = array.ndim > len(axes[name])
        layers = array if stack else [array]
        arrays |= {f"{name} {i}": np.asarray(layer) for i, layer in enumerate(layers)}
    return arrays


def train(numbers: Optim, steps: int = 20) -> list[dict[str, np.ndarray]]:
    """Parameters after each step on random gradients, layer by layer."""
    tx = make_optimizer(numbers, make_schedule(numbers, steps), AXES)
    params, update = random_tree(99), jax.jit(tx.update)
    state, history = tx.init(params), []
    for step in range(steps):
        updates, state = update(random_tree(step, 0.3 + step % 3), state, params)
        params = optax.apply_updates(params, updates)
        history.append(each_layer(params))
    return history


def train_torch(make: Any, numbers: Optim, steps: int = 20) -> list[dict[str, np.ndarray]]:
    """The same with torch optimizers: `make(parameters, weight_decay)`."""
    import torch

    params = {
        name: torch.nn.Parameter(torch.tensor(array))
        for name, array in each_layer(random_tree(99)).items()
    }
    optimizers = [make([p], numbers.weight_decay if p.ndim > 1 else 0.0) for p in params.values()]
    history = []
    for step in range(steps):
        grads = each_layer(random_tree(step, 0.3 + step % 3))
        for name, param in params.items():
            param.grad = torch.tensor(grads[name])
        if numbers.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(params.values()), numbers.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        history.append({name: p.detach().numpy().copy() for name, p in params.items()})
    return history


def assert_same_path(got: list[dict], expected: list[dict], tolerance: float) -> None:
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert difference(ours[name], array) <= tolerance, (step, name)


def constant(name: str, **changes: Any) -> Optim:
    numbers = {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.1}
    return Optim(name=name, **numbers | changes)
