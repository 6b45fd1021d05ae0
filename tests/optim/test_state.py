"""Every optimizer in the train step: learning, skipping, sharding, saving, and host memory."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import build, fit, optim
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.store import Store
from jaxtune.data import TokenBatch, TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError
from jaxtune.optim import OPTIMIZERS
from jaxtune.schema import Data, Model, Optim, Peft, RunConfig
from jaxtune.sharding.mesh import HOST, make_mesh, require_host_memory
from tests import tolerances

RATES = {"lion": 1e-3, "adafactor": 5e-3}
ONE, EIGHT = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 2}
# Wide enough that some matrices have 8-bit moments, in place and flattened.
WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 16}
NAMES = sorted(OPTIMIZERS)
FAST = ("adamw8bit", "muon")  # adamw is in tests/test_step.py
# Their compilation takes half a minute; tests/optim/test_low_rank.py spreads one kernel.
LONG = ("galore", "galore8bit", "apollo", "apollo_mini")


class Trainee:
    """A wide tiny:llama of three scanned layers, all of whose parameters learn."""

    def __init__(self, name: str, mesh: dict[str, int], offload: bool = False):
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        rate = RATES.get(name, 5e-3)
        config = RunConfig(
            model=Model(layers="scan", remat="none"),
            peft=Peft(method="full"),
            data=Data(train=("rows.jsonl",)),
            optim=Optim(name=name, learning_rate=rate, weight_decay=0.1, offload=offload),
        )
        checkpoint = open_checkpoint("tiny:llama")
        checkpoint = dataclasses.replace(checkpoint, config=checkpoint.config | WIDE)
        self.run = build.describe(config, make_mesh(mesh, devices), checkpoint)
        self.schedule = optim.make_schedule(config.optim, 100)
        self.axes = build.trained_axes(self.run)
        self.tx = optim.make_optimizer(config.optim, self.schedule, self.axes)
        self.abstract = build.abstract_state(self.run, self.tx)

    def random(self, seed: int, scale: float) -> dict[str, jax.Array]:
        """Random arrays like the parameters."""
        random = np.random.default_rng(seed)
        values = {}
        for name, leaf in sorted(self.run.trainable.items()):
            value = random.normal(0, scale, leaf.shape) + name.endswith("norm.scale")
            values[name] = jax.device_put(value.astype(np.float32), leaf.sharding)
        return values

    def start(self) -> Any:
        return build.initial_state(self.run, self.tx, self.random(0, 0.05))

    def step_alone(self, steps: int) -> Any:
        """The state after updates by random gradients, without a model."""
        state, apply = self.start(), optim.make_apply(self.run.config.optim, self.axes)
        jitted = jax.jit(
            functools.partial(apply, self.tx),
            donate_argnums=(1, 2),
            out_shardings=build.shardings((self.abstract.trainable, self.abstract.opt_state)),
        )
        params, opt_state = state.trainable, state.opt_state
        for seed in range(1, steps + 1):
            grads = self.random(seed, 1.0)
            norm = np.float32(np.sqrt(sum(np.square(g).sum() for g in grads.values())))
            params, opt_state = jitted(grads, params, opt_state, True, norm)
        assert jitted._cache_size() == 1
        return params, opt_state


def make_batch() -> TokenBatch:
    random = np.random.default_rng(0)
    rows = [
        [TokenRow(random.integers(0, 259, 20).astype(np.int32), np.arange(20) > 2)]
        for _ in range(4)
    ]
    return jax.tree.map(lambda leaf: leaf[None], stack_rows(rows, 24))


BATCH = make_batch()


def bytes_of(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES],
)
def test_steps_learn_skip_and_survive_a_restart(name: str, tmp_path: Path):
    trainee = Trainee(name, EIGHT)
    run, step = fit.fitted_step(trainee.run, trainee.tx, trainee.schedule)
    state, losses = trainee.start(), []
    for _ in range(5):
        state, metrics = step(state, {}, run.put(BATCH))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert float(metrics["learning_rate"]) == pytest.approx(float(trainee.schedule(4)))
    kept = bytes_of((state.trainable, state.opt_state))
    endless = np.where(BATCH.weights > 0, np.float32(np.inf), 0)
    state, metrics = step(state, {}, run.put(dataclasses.replace(BATCH, weights=endless)))
    assert bool(metrics["skipped"])
    assert bytes_of((state.trainable, state.opt_state)) == kept
    store = Store(tmp_path)
    store.save(6, state, {}, final=True)
    store.close()
    restored = Store(tmp_path).restore(6, trainee.abstract)
    assert restored is not None
    assert bytes_of(restored[1]) == bytes_of(state)
    leaves = jax.tree.leaves(restored[1])
    for leaf, wanted in zip(leaves, jax.tree.leaves(trainee.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def assert_same(got: Any, expected: Any) -> None:
    """All but a few elements: where a number is next to a rounding's edge, codes differ by one."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        change = np.abs(np.asarray(ours, np.float64) - np.asarray(right, np.float64))
        limit = tolerances.SHARDED * np.abs(np.asarray(right, np.float64)).max()
        assert np.mean(change > limit) <= 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in NAMES]
)
def test_eight_devices_are_one_device(name: str):
    assert_same(Trainee(name, EIGHT).step_alone(3), Trainee(name, ONE).step_alone(3))


def test_state_is_sharded_like_its_parameter():
    state = Trainee("adamw8bit", EIGHT).start().opt_state
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    shapes = {}
    for path, leaf in leaves.items():
        if path.endswith("layers.0.mlp.down_proj.kernel"):
            shapes[path.split(".")[2]] = (leaf.shape, leaf.addressable_shards[0].data.shape)
    # [mlp, embed] with 320 rows is flattened: the blocks have the place of the columns.
    assert shapes["m"] == ((3, 320, 256), (3, 160, 64))
    assert shapes["m_scale"] == ((3, 1, 320), (3, 1, 80))


@pytest.mark.parametrize(
    "name",
    ["adamw", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adafactor", "lion"))],
)
def test_state_in_host_memory(name: str):
    params, opt_state = Trainee(name, EIGHT, offload=True).step_alone(3)
    kinds = {
        jax.tree_util.keystr(path): leaf.sharding.memory_kind
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }
    matrices = {kind for path, kind in kinds.items() if "kernel" in path or "table" in path}
    assert matrices == {HOST}
    assert HOST not in {kind for path, kind in kinds.items() if "count" in path or "norm" in path}
    assert_same((params, opt_state), Trainee(name, EIGHT).step_alone(3))


@pytest.mark.slow
def test_a_step_with_the_state_in_host_memory_is_the_same_step(tmp_path: Path):
    ends = []
    for offload in (False, True):
        trainee = Trainee("lion", {"data": 1, "fsdp": 2, "tensor": 1}, offload)
        run, step = fit.fitted_step(trainee.run, trainee.tx, trainee.schedule)
        state = trainee.start()
        for _ in range(2):
            state, metrics = step(state, {}, run.put(BATCH))
        ends.append((state.opt_state, metrics["loss"]))
        store = Store(tmp_path / str(offload))
        store.save(2, state, {}, final=True)
        store.close()
        restored = Store(tmp_path / str(offload)).restore(2, trainee.abstract)
        assert restored is not None and bytes_of(restored[1]) == bytes_of(state)
        kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored[1].opt_state)]
        assert (HOST in kinds) == offload
    assert_same(*ends)


def test_a_platform_without_host_memory_is_refused():
    class Device:
        platform, device_kind, process_index = "other", "other", 0

        def addressable_memories(self) -> list:
            return []

    mesh: Any = type("Mesh", (), {"devices": np.array([Device()])})()
    with pytest.raises(ConfigError, match="optim.offload needs devices with host memory"):
        require_host_memory(mesh, "optim.offload")
    require_host_memory(make_mesh(ONE, jax.devices()[:1]), "optim.offload")
