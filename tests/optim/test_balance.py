"""Experts balanced by a bias, against transformers' router and the paper's algorithm."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtune import build, fit, models, optim
from jaxtune.data.batch import TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError
from jaxtune.policy import resolve_policy
from jaxtune.schema import Data, Mesh, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from tests import oracle

RATE, ROWS, LENGTH, LAYERS = 0.02, 8, 24, 2
CONFIG = RunConfig(
    peft=Peft(method="full"),
    data=Data(train=("rows.jsonl",), max_seq_len=LENGTH),
    train=Train(router_bias_update_rate=RATE),
)
FIELDS = models.family("deepseek_v3").TINY | {"num_hidden_layers": LAYERS + 1}


def rows() -> list[np.ndarray]:
    """Tokens of rows of uneven length, the rest of which is padding."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, random.integers(5, LENGTH)) for _ in range(ROWS)]


def loads(hf: Any) -> np.ndarray:
    """Tokens of each expert in transformers' model, [layers with experts, E]."""
    import torch

    tokens = np.zeros((ROWS, LENGTH), np.int64)
    is_token = np.arange(LENGTH) < np.array([[len(row)] for row in rows()])
    tokens[is_token] = np.concatenate(rows())
    gates = [layer.mlp.gate for layer in hf.model.layers[1:]]
    found = np.zeros((len(gates), FIELDS["n_routed_experts"]))

    def count(i: int) -> Any:
        def hook(gate: Any, given: Any, result: tuple) -> None:
            np.add.at(found[i], result[2].numpy()[is_token.ravel()].ravel(), 1)

        return hook

    hooks = [gate.register_forward_hook(count(i)) for i, gate in enumerate(gates)]
    with torch.no_grad():
        hf(torch.tensor(tokens))  # padding stands behind what sees it
    for hook in hooks:
        hook.remove()
    return found


def biases(hf: Any) -> list[Any]:
    return [layer.mlp.gate.e_score_correction_bias for layer in hf.model.layers[1:]]


def steps(hf: Any, mesh: Mesh, accumulation: int, count: int) -> list[np.ndarray]:
    """The biases after each step of a run that learns nothing else, [layers, E] each."""
    shards = mesh.fsdp * mesh.expert
    train = dataclasses.replace(
        CONFIG.train,
        micro_batch_size=ROWS // accumulation // shards,
        gradient_accumulation_steps=accumulation,
    )
    config = dataclasses.replace(CONFIG, mesh=mesh, train=train)
    devices = jax.devices()[:shards]
    run = build.describe(config, make_mesh(mesh.axes(), devices), oracle.checkpoint_of(hf))
    assert {name.rpartition(".")[2] for name in run.loads} == {"correction"}
    values = build.fill_base(run, lambda done, total: None)
    schedule = optax.constant_schedule(0.0)
    tx = optim.balance(optax.sgd(schedule), run.loads, RATE)
    batch = stack_rows(
        [[TokenRow(r.astype(np.int32), np.arange(len(r)) > 0)] for r in rows()], LENGTH
    )
    batch = jax.tree.map(lambda x: x.reshape(accumulation, -1, LENGTH), batch)
    step = fit._step(run, tx, schedule)
    state, found = build.initial_state(run, tx, values), []
    for _ in range(count):
        state, metrics = step(state, {}, run.put(batch))
        assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 0
        learnt = {name: np.asarray(x) for name, x in state.trainable.items()}
        found.append(np.concatenate([learnt[name] for name in sorted(run.loads)]))
    return found


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        (Mesh(fsdp=2, expert=2), 2),
        pytest.param(Mesh(fsdp=1), 1, marks=pytest.mark.slow),
        pytest.param(Mesh(fsdp=4), 1, marks=pytest.mark.slow),
    ],
)
def test_skewed_routers_become_even_as_the_algorithm_says(mesh: Mesh, accumulation: int):
    import torch

    hf = oracle.hf_model(FIELDS)
    for bias in biases(hf):
        with torch.no_grad():
            bias.copy_(torch.tensor([0.5, 0.4, 0.3, 0, 0, 0, 0, -0.3]))
    found = steps(hf, mesh, accumulation, 40)
    violation = []
    for got in found:
        load = loads(hf)
        mean = load.mean(axis=1, keepdims=True)
        violation.append(load.max() / mean.max() - 1)
        for bias, step in zip(biases(hf), RATE * np.sign(mean - load), strict=True):
            with torch.no_grad():
                bias += torch.tensor(step, dtype=torch.float32)
        expected = np.stack([bias.numpy() for bias in biases(hf)])
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.mean(violation[-5:]) < 0.6 * violation[0]


def test_it_needs_a_bias_that_trains():
    def resolved(family: str, method: str, **mesh: int) -> Any:
        config = dataclasses.replace(CONFIG, peft=Peft(method=method), mesh=Mesh(**mesh))
        module = models.family(family)
        devices = jax.devices()[: mesh.get("stage", 1)]
        axes = {"data": 1} | mesh
        return resolve_policy(config, module.Config.from_hf(module.TINY), make_mesh(axes, devices))

    assert resolved("deepseek_v3", "full").counts_loads
    with pytest.raises(ConfigError, match="the model has no e_score_correction_bias"):
        resolved("mixtral", "full")
    with pytest.raises(ConfigError, match="which peft.method=lora leaves as it is"):
        resolved("deepseek_v3", "lora")
    with pytest.raises(ConfigError, match="set mesh.stage=1"):
        resolved("deepseek_v3", "full", stage=2)
