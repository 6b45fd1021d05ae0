"""Frozen weights in host memory: the same step, less of the device."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxtune import build, fit
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenBatch
from jaxtune.errors import ConfigError
from jaxtune.planning.topology import DEVICELESS
from jaxtune.schema import FETCHING, Data, Model, Quant, RunConfig, Train
from jaxtune.sharding.mesh import HOST, make_mesh
from tests import tolerances
from tests.oracle import difference

ROOT = Path(__file__).parents[1]
RATE = optax.constant_schedule(0.1)
TX = optax.sgd(RATE)


def described(quant: Quant | None = None, devices: int = 2, **model: Any) -> build.Run:
    config = RunConfig(
        model=Model(**model),
        quant=quant or Quant(),
        data=Data(train=("rows.jsonl",), max_seq_len=16),
        train=Train(micro_batch_size=1),
    )
    mesh = make_mesh({"data": 1, "fsdp": devices, "tensor": 1}, jax.devices()[:devices])
    return build.describe(config, mesh, open_checkpoint("tiny:llama"))


def stepped(run: build.Run) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Metrics and trained values after two steps from the run's own first values."""
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    state = build.initial_state(run, TX, values)
    frozen = {name: values[name] for name in run.frozen}
    for name, leaf in frozen.items():
        is_matrix = name.startswith("layers.") and name.endswith(".kernel")
        on_host = run.policy.offload_frozen and is_matrix
        assert (leaf.sharding.memory_kind == HOST) == on_host, name
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(1, 2, 16) % 200 + 1
    ones, places = jnp.ones((1, 2, 16)), jnp.broadcast_to(jnp.arange(16), (1, 2, 16))
    batch = TokenBatch(tokens, places.astype(jnp.int32), ones.astype(jnp.int32), ones)
    metrics: dict[str, Any] = {}
    step = fit._step(run, TX, RATE)
    for _ in range(2):
        state, metrics = step(state, frozen, run.put(batch))
    return metrics, state.trainable


@pytest.mark.parametrize(
    "remat", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in FETCHING)]
)
def test_the_step_is_the_same(remat: str):
    (expected, trained), (metrics, found) = (
        stepped(described(remat=remat, offload_frozen=away)) for away in (False, True)
    )
    assert difference(metrics["loss"], expected["loss"]) <= tolerances.OPS
    for name in trained:
        assert difference(found[name], trained[name]) <= tolerances.SHARDED, name


def test_quantized_weights_are_refused():
    with pytest.raises(ConfigError, match="offload_frozen: .*kernel is quantized"):
        described(quant=Quant(format=("int8",)), offload_frozen=True)


def test_a_run_says_where_its_weights_are():
    run = described(offload_frozen=True)
    on_host = {n for n, leaf in run.frozen.items() if leaf.sharding.memory_kind == HOST}
    assert on_host == {n for n in run.frozen if n.startswith("layers.") and n.endswith(".kernel")}
    assert not any(leaf.sharding.memory_kind == HOST for leaf in run.trainable.values())
    assert dataclasses.asdict(run.config)["model"]["offload_frozen"]


COMPILE = """
import json, sys
import jax, optax
from jax.experimental import topologies
from jaxtune import build, config, fit
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.sharding.mesh import make_mesh

remat, away = sys.argv[1:]
tree = config.default()
tree.data.train = ("none: only shapes are used",)
tree.data.max_seq_len = 512
tree.model.path, tree.model.remat = "tiny:llama", remat
tree.model.offload_frozen = away == "away"
tree.mesh.fsdp = -1
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
checkpoint = open_checkpoint(tree.model.path)
checkpoint.config.update(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=128,
    num_attention_heads=8, num_key_value_heads=8)
run = build.describe(config.resolve(tree), mesh, checkpoint)
rate = optax.constant_schedule(0.1)
tx = optax.sgd(rate)
step = fit._step(run, tx, rate)
compiled = step.lower(build.abstract_state(run, tx), run.frozen, fit.abstract_batch(run)).compile()
plan = compiled.memory_analysis()
print(json.dumps({
    "layers": sum(x.size * x.dtype.itemsize for n, x in run.frozen.items()
                  if n.startswith("layers.") and n.endswith(".kernel")) // 4,
    "arguments": plan.argument_size_in_bytes, "temporaries": plan.temp_size_in_bytes,
    "host": plan.host_argument_size_in_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("remat", FETCHING)
def test_weights_leave_a_tpu(remat: str):
    """Each of four devices has a quarter of every matrix."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")

    def compiled(where: str) -> dict[str, int]:
        settings = DEVICELESS | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", COMPILE, remat, where]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    stay, away = compiled("stay"), compiled("away")
    assert stay["host"] == 0 and away["host"] >= away["layers"]
    assert stay["arguments"] - away["arguments"] >= 0.99 * stay["layers"]
    # Weights of two layers of eight, coming and being used.
    assert away["temporaries"] - stay["temporaries"] <= 2.1 / 8 * stay["layers"]
