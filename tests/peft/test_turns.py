"""LISA and BAdam: layers that train in turn, against full tuning and optimizers that begin anew."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtune
from jaxtune import build, objectives, optim, peft
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError
from jaxtune.optim.restart import restart
from jaxtune.schema import Checkpoint, Data, Log, Model, Optim, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from tests import tolerances
from tests.oracle import difference

ONE, EIGHT = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
OBJECTIVE = functools.partial(objectives.OBJECTIVES["sft"], loss_dtype=jnp.float32)
RATE = optax.constant_schedule(0.5)


def describe(mesh: dict[str, int] = ONE, **peft: Any) -> build.Run:
    config = RunConfig(
        model=Model(layers="scan"), peft=Peft(**peft), data=Data(train=("rows.jsonl",))
    )
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return build.describe(config, make_mesh(mesh, devices), open_checkpoint("tiny:llama"))


def make_batch(seed: int) -> Any:
    """[2, 4, 24]"""
    random = np.random.default_rng(seed)
    rows = [
        [TokenRow(random.integers(0, 259, n).astype(np.int32), np.arange(n) > 2)]
        for n in (20, 24, 9, 15, 7, 24, 11, 3)
    ]
    return jax.tree.map(lambda leaf: leaf.reshape(2, 4, 24), stack_rows(rows, 24))


def states(run: build.Run, steps: int) -> list[dict[str, np.ndarray]]:
    """The model's parameters at first and after each step of gradient descent."""
    values = build.fill_base(run, lambda done, total: None)
    tx = optax.sgd(RATE)
    shardings = build.shardings(build.abstract_state(run, tx))
    state = build.initial_state(run, tx, values)
    frozen = {name: values[name] for name in run.frozen}
    gradients = build.gradient_shardings(run)
    step = make_train_step(
        *(run.skeleton, OBJECTIVE, tx, RATE, 0, shardings),
        gradient_shardings=gradients,
        turns=run.turns,
    )
    found = [jax.tree.map(np.asarray, frozen | state.learnt)]
    for seed in range(steps):
        state, _ = step(state, frozen, run.put(make_batch(seed)))
        found.append(jax.tree.map(np.asarray, frozen | state.learnt))
    assert step._cache_size() == 1
    return found


@pytest.fixture(scope="module")
def full() -> list[dict[str, np.ndarray]]:
    return states(describe(method="full"), 1)


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("lisa", EIGHT),
        pytest.param("lisa", ONE, marks=pytest.mark.slow),
        ("badam", ONE),
        pytest.param("badam", EIGHT, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_learn_in_their_turn_what_they_learn_in_full_tuning(
    method: str, mesh: dict[str, int], full: list
):
    layers = {"lisa": 2, "badam": 1}[method]
    run = describe(mesh, method=method, active_layers=layers, switch_steps=1)
    found = states(run, 3)
    assert run.turns is not None
    trained = set()
    for step in range(3):
        before, after = found[step], found[step + 1]
        active = set(np.asarray(run.turns.active(jnp.int32(step))).tolist())
        assert len(active) == layers
        trained |= active
        for name, array in after.items():
            if not name.startswith("layers."):
                assert (array != before[name]).any() == (method == "lisa"), name
                continue
            changed = {i for i in range(3) if (array[i] != before[name][i]).any()}
            assert changed == active, name
            if step == 0:
                rows = sorted(active)
                expected = (full[1][name] - full[0][name])[rows]
                assert difference((array - before[name])[rows], expected) <= 2e-5, name
    assert trained == {0, 1, 2} or method == "lisa"


def test_turns():
    lisa = peft.turns(Peft(method="lisa", active_layers=3), 10, 7)
    badam = peft.turns(Peft(method="badam", active_layers=4), 10, 7)
    assert lisa is not None and badam is not None and peft.turns(Peft(), 10, 7) is None
    drawn = [tuple(np.asarray(lisa.active(jnp.int32(turn)))) for turn in range(40)]
    assert all(list(layers) == sorted(set(layers)) for layers in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert counts.min() >= 4 and len(set(drawn)) > 20
    blocks = [np.asarray(badam.active(jnp.int32(turn))).tolist() for turn in range(4)]
    assert blocks == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 8, 9], [0, 1, 2, 3]]
    with pytest.raises(ConfigError, match="active_layers=4: the model has 3 layers"):
        describe(method="lisa", active_layers=4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_begins_anew_with_every_turn(name: str):
    axes = {"layers.0.up.kernel": ("embed", "mlp"), "norm.scale": ("embed",)}
    random = np.random.default_rng(0)
    params: Any = {n: jnp.float32(random.normal(size=(4, 6)[: len(a)])) for n, a in axes.items()}
    grads: Any = [jax.tree.map(lambda p: p * random.normal(), params) for _ in range(5)]
    direction = optim.OPTIMIZERS[name](Optim(), axes)
    tx = restart(direction, {"layers.0.up.kernel"}, 2)
    state, lasting, fresh = tx.init(params), direction.init(params), None
    for step, grad in enumerate(grads):
        fresh = direction.init(params) if step % 2 == 0 else fresh
        got, state = tx.update(grad, state, params)
        expected, fresh = direction.update(grad, fresh, params)
        always, lasting = direction.update(grad, lasting, params)
        kernel, vector = axes
        assert difference(got[kernel], expected[kernel]) <= tolerances.OPS, step
        assert difference(got[vector], always[vector]) <= tolerances.OPS, step


def test_only_active_layers_have_state_and_float32():
    """With bfloat16 weights: what a run holds between its steps, of twelve layers."""
    held = {}
    for options in ({"method": "full"}, {"method": "badam", "active_layers": 1}):
        config = RunConfig(
            model=Model(param_dtype="bfloat16"),
            peft=Peft(**options),
            data=Data(train=("rows.jsonl",)),
        )
        checkpoint = open_checkpoint("tiny:llama")
        deep = checkpoint.config | {"num_hidden_layers": 12}
        checkpoint = dataclasses.replace(checkpoint, config=deep)
        run = build.describe(config, make_mesh(ONE, jax.devices()[:1]), checkpoint)
        tx = build.make_optimizer(run, optim.make_schedule(config.optim, 10))
        state = build.abstract_state(run, tx)
        leaves = jax.tree.leaves((run.frozen, state))
        held[options["method"]] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert {leaf.dtype for leaf in state.in_turn.values()} == {jnp.dtype("bfloat16")}
    learning = jax.tree.leaves((state.trainable, state.opt_state))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in learning)
    assert all(leaf.shape[0] == 1 for leaf in learning if leaf.shape)
    # 2 bytes a weight, and 12 more of one layer of twelve, against 12 of all.
    assert held["badam"] < 0.3 * held["full"], held


def config_of(folder: Path, name: str, method: str, num_steps: int) -> RunConfig:
    rows = [{"instruction": f"Say {i}.", "output": f"{i} {i}"} for i in range(12)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"output_dir": str(folder / name), "compilation_cache": ""}
    return RunConfig(
        peft=Peft(method=method, active_layers=1, switch_steps=2),
        data=Data(train=(str(file),), max_seq_len=64, packing=False),
        optim=Optim(learning_rate=1e-2, schedule="constant"),
        train=Train(num_steps=num_steps, micro_batch_size=1, **where),
        checkpoint=Checkpoint(every_steps=1),
        log=Log(tensorboard=False, plot=False),
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lisa", "badam"])
def test_a_resumed_run_is_an_uninterrupted_one(method: str, tmp_path: Path):
    whole = jaxtune.train(config_of(tmp_path, "whole", method, 5))
    jaxtune.train(config_of(tmp_path, "parts", method, 3))  # in the middle of a turn
    parts = jaxtune.train(config_of(tmp_path, "parts", method, 5))
    merged, again = (open_checkpoint(str(r.paths["merged"])) for r in (whole, parts))
    tiny = open_checkpoint("tiny:llama")
    for name in merged.tensors:
        assert merged.read(name).tobytes() == again.read(name).tobytes(), name
        if name.startswith("model.layers.") and method == "badam":
            assert (merged.read(name) != tiny.read(name)).any(), name
