"""Every arrangement of eight devices trains like one device, and holds its share of the memory."""

import dataclasses
import functools
import itertools
import math
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxtune import build, models
from jaxtune.data import TokenBatch
from jaxtune.data.batch import TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.fit import training_objective
from jaxtune.quant import QArray
from jaxtune.schema import Data, Mesh, Model, Peft, Quant, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from jaxtune.train import train
from tests import oracle, test_train, tolerances
from tests.oracle import difference

# Every axis of the model can be cut into eight.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
METHODS = {
    "lora": RunConfig(peft=Peft(rank=8, alpha=8.0)),
    "int8": RunConfig(peft=Peft(rank=8, alpha=8.0), quant=Quant(format=("int8",))),
    "full": RunConfig(peft=Peft(method="full")),
    "prefix": RunConfig(peft=Peft(method="prefix", num_virtual_tokens=8)),
    "prompt": RunConfig(peft=Peft(method="prompt", num_virtual_tokens=2)),
    "longlora": RunConfig(peft=Peft(rank=8, alpha=8.0), train=Train(attention_group=4)),
}
RATE = optax.constant_schedule(0.1)
STEPS, ROWS, LENGTH = 5, 8, 32


def arrangements() -> list[dict[str, int]]:
    """Sizes of the mesh's axes whose product is eight."""
    names = tuple(name for name in Mesh().axes() if name != "expert")  # the model has none
    found = []
    for owners in itertools.product(names, repeat=3):  # who takes each factor of two
        sizes = {name: 2 ** owners.count(name) for name in names}
        found += [] if sizes in found else [sizes]
    return found


QUICK = [
    {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2},
    {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
    {"stage": 2, "fsdp": 2, "tensor": 2},
]


@functools.cache
def base() -> Any:
    return oracle.checkpoint_of(oracle.hf_llama(**SIZES))


@functools.cache
def mixture() -> Any:
    experts = {"num_local_experts": 4, "hidden_size": 32, "num_hidden_layers": 2}
    return oracle.checkpoint_of(oracle.hf_model(models.family("mixtral").TINY | experts))


def batches() -> list[TokenBatch]:
    """[1, B, T] each: two packed examples a row, of uneven lengths, the first answers untrained."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(2):
        rows = []
        for _ in range(ROWS):
            lengths = random.integers(4, LENGTH // 2, 2)
            rows.append(
                [
                    TokenRow(random.integers(0, 256, n).astype(np.int32), np.arange(n) > 1)
                    for n in lengths
                ]
            )
        found.append(jax.tree.map(lambda leaf: leaf[None], stack_rows(rows, LENGTH)))
    return found


def joined(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of the layers as those of one stack."""
    found: dict[str, list[np.ndarray]] = {}
    for name in sorted(params):
        found.setdefault(re.sub(r"^layers\.\d+", "layers.0", name), []).append(params[name])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def trained(
    method: str, mesh: Mesh, train: Any = None, **model: Any
) -> tuple[build.Run, dict, list[float], Any]:
    """The run, its trained parameters, the loss of each step and the state after the last."""
    config = dataclasses.replace(
        METHODS[method],
        mesh=mesh,
        model=Model(**{"layers": "scan", "remat": "full"} | model),
        data=Data(train=("rows.jsonl",), max_seq_len=LENGTH),
        train=dataclasses.replace(
            METHODS[method].train,
            micro_batch_size=ROWS // (mesh.data * mesh.fsdp),
            **train or {},
        ),
    )
    devices = jax.devices()[: math.prod(mesh.axes().values())]
    run = build.describe(config, make_mesh(mesh.axes(), devices), base())
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    for name in values:
        if name.endswith(".adapter.b"):
            _, stack, rest = name.split(".", 2)
            random = np.random.default_rng(zlib.crc32(rest.encode()))
            size = values[name].shape
            first = int(stack) * size[0]
            noise = random.normal(0, 0.1, (sum(run.stacks), *size[1:]))[first : first + size[0]]
            values[name] = jax.device_put(noise.astype(np.float32), values[name].sharding)
    tx = optax.sgd(RATE, momentum=0.9)
    places = build.shardings(build.abstract_state(run, tx))
    gradients = build.gradient_shardings(run)
    step = make_train_step(
        run.skeleton, training_objective(run), tx, RATE, 0, places, gradient_shardings=gradients
    )
    state = build.initial_state(run, tx, values)
    frozen = {name: values[name] for name in run.frozen}
    losses = []
    for batch in itertools.islice(itertools.cycle(batches()), STEPS):
        state, metrics = step(state, frozen, run.put(batch))
        losses.append(float(metrics["loss"]))
    return run, joined({n: np.asarray(x) for n, x in state.trainable.items()}), losses, state


@functools.cache
def alone(method: str) -> tuple[dict, list[float]]:
    _, found, losses, _ = trained(method, Mesh(fsdp=1))
    assert losses[-1] < losses[0]
    return found, losses


def check(method: str, mesh: Mesh, train: Any = None, **model: Any) -> tuple[build.Run, Any]:
    expected, losses = alone(method)
    run, found, other_losses, state = trained(method, mesh, train, **model)
    np.testing.assert_allclose(other_losses, losses, rtol=tolerances.SHARDED)
    for name, array in expected.items():
        assert difference(found[name], array) <= tolerances.SHARDED, name
    return run, state


def share(name: str, leaf: Any, mesh: Mesh) -> int:
    """How many ways a matrix of the layers, or what an optimizer keeps of it, is to be cut.

    An adapter's matrix has one axis of the kernel's two, so tensor shards may hold it whole.
    """
    whole = math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
    everywhere = mesh.stage * mesh.fsdp * mesh.sequence
    if not name.endswith(".kernel"):
        assert whole in (everywhere, everywhere * mesh.tensor), name
        return whole
    return everywhere * mesh.tensor


def check_shares(run: build.Run, state: Any) -> None:
    """Weights, adapters and optimizer state of the layers take 1/n of their memory."""
    kept = {**run.frozen, **state.trainable}, state.opt_state[0].trace
    counted = 0
    for values in kept:
        for name, value in values.items():
            if len(run.skeleton.axes(name)) < 2 or not name.startswith("layers."):
                continue
            leaf = value.codes if isinstance(value, QArray) else value
            local = math.prod(leaf.sharding.shard_shape(leaf.shape))
            assert local * share(name, leaf, run.config.mesh) == math.prod(leaf.shape), name
            counted += 1
    assert counted >= 7  # a layer's kernels, at least


@pytest.mark.parametrize("mesh", QUICK, ids=str)
def test_meshes_train_like_one_device(mesh: dict[str, int]):
    check_shares(*check("lora", Mesh(**mesh)))


@pytest.mark.slow  # tests/nn/test_moe.py has the layer alone
@pytest.mark.parametrize("method", ["lora", "int8", "full"])
def test_experts_train_on_their_axis_like_on_one_device(
    method: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules[__name__], "base", mixture)
    balanced = {"router_aux_loss": 0.01}
    _, expected, losses, _ = trained(method, Mesh(fsdp=1), balanced)
    mesh = Mesh(fsdp=2, expert=2, tensor=2)
    run, found, other_losses, _ = trained(method, mesh, balanced)
    np.testing.assert_allclose(other_losses, losses, rtol=tolerances.SHARDED)
    kernel = run.variables["layers.0.mlp.experts.gate_proj.kernel"]
    kernel = kernel.codes if isinstance(kernel, QArray) else kernel
    assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == math.prod(kernel.shape)
    assert any(".experts." in name for name in expected)
    for name, array in expected.items():
        assert difference(found[name], array) <= tolerances.SHARDED, name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", arrangements(), ids=str)
def test_all_meshes_train_like_one_device(mesh: dict[str, int], method: str):
    check_shares(*check(method, Mesh(**mesh)))


# Stages, micro-batches and chunks; the method and what is recomputed.
PIPELINES = [
    ({"stage": 4, "fsdp": 2}, {"pipeline_chunks": 2}, "lora", "dots"),
    ({"stage": 2}, {"pipeline_micro_batches": 8, "pipeline_chunks": 4}, "full", "full"),
    ({"stage": 4}, {"pipeline_micro_batches": 8}, "int8", "none"),
    ({"stage": 2, "tensor": 2}, {"pipeline_chunks": 2}, "int8", "full"),
    ({"stage": 2, "sequence": 2}, {"pipeline_micro_batches": 4}, "full", "attention"),
]


@pytest.mark.parametrize(
    ("mesh", "train", "method", "remat"),
    [PIPELINES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in PIPELINES[1:])],
    ids=str,
)
def test_pipelines_of_many_kinds(mesh: dict, train: dict, method: str, remat: str):
    run, state = check(method, Mesh(**{"fsdp": 1} | mesh), train, remat=remat)
    assert len(run.stacks) == train.get("pipeline_chunks", 1)
    check_shares(run, state)


@pytest.mark.parametrize("context_parallel", ["ring", "ulysses"])
def test_both_ways_across_the_sequence_axis(context_parallel: str):
    check("lora", Mesh(fsdp=1, sequence=4), context_parallel=context_parallel)


@pytest.mark.parametrize("stage", [1, 2])
def test_sharding_stages_keep_what_they_say_whole(stage: int):
    run, state = check("full", Mesh(fsdp=4, tensor=2, sharding_stage=stage))
    name = "layers.0.mlp.up_proj.kernel"
    parameter, kept = state.trainable[name], state.opt_state[0].trace[name]
    assert parameter.size == 2 * parameter.addressable_shards[0].data.size
    assert kept.size == 8 * kept.addressable_shards[0].data.size
    gradients = build.gradient_shardings(run)
    assert (gradients is None) == (stage == 1)


def test_tensor_shards_in_bfloat16():
    """Products are then mapped by hand; sums over shards are rounded to bfloat16."""
    half = {"compute_dtype": "bfloat16"}
    _, expected, losses, _ = trained("lora", Mesh(fsdp=1), **half)
    _, found, other_losses, _ = trained("lora", Mesh(fsdp=2, tensor=4), **half)
    np.testing.assert_allclose(other_losses, losses, rtol=tolerances.OPS_BFLOAT16)
    for name, array in expected.items():
        assert difference(found[name], array) <= tolerances.OPS_BFLOAT16, name


@pytest.mark.slow
def test_a_run_goes_on_with_another_sharding_stage_and_mesh(tmp_path: Path):
    """Full tuning: steps 3 and 4 from the checkpoint of step 2."""

    def run(resume: str, micro_batch_size: int, **mesh: int) -> tuple[dict[str, np.ndarray], float]:
        config = test_train.run_config(
            tmp_path,
            "run",
            peft={"method": "full", "rank": Peft().rank},
            train={"micro_batch_size": micro_batch_size},
            checkpoint={"every_steps": 2, "keep_last": 9, "resume": resume},
            mesh=mesh,
        )
        result = train(config)
        return load_file(result.paths["merged"] / "model.safetensors"), result.metrics["loss"]

    expected, loss = run("auto", 2, fsdp=4, tensor=2)
    for stage in (1, 2):
        found, other_loss = run("2", 1, data=2, fsdp=4, sharding_stage=stage)
        assert other_loss == pytest.approx(loss, rel=tolerances.SHARDED)
        for name, array in expected.items():
            assert difference(found[name], array) <= 1e-4, name  # after Adam
