"""Adapters on a quantized base: the same maths as on the dequantized one, in every layout."""

import dataclasses
import functools
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import build, data, quant
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data import TokenBatch
from jaxtune.errors import ConfigError
from jaxtune.exports import write_adapter, write_merged
from jaxtune.nn.stack import REMAT
from jaxtune.quant import QArray
from jaxtune.schema import Data, Model, Peft, Quant, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from tests import oracle, tolerances

SIZES = {"hidden_size": 128, "intermediate_size": 256}
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
MIX = ("nf4=.*mlp.*", "int8=.*attn.(q|k|v)_proj")
RATE = optax.constant_schedule(0.5)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return oracle.checkpoint_of(oracle.hf_llama(**SIZES))


def described(
    checkpoint: Checkpoint, formats: tuple[str, ...], mesh: dict[str, int] = ONE, **model: Any
) -> build.Run:
    config = RunConfig(
        model=Model(**{"layers": "scan", "remat": "none"} | model),
        quant=Quant(format=formats),
        peft=Peft(rank=4, alpha=8.0),
        data=Data(train=("rows.jsonl",)),
    )
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return build.describe(config, make_mesh(mesh, devices), checkpoint)


def filled(run: build.Run) -> dict[str, Any]:
    """All parameters, with adapters that change something."""
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    for name, array in values.items():
        if name.endswith(".adapter.b"):
            random = np.random.default_rng(zlib.crc32(name.split(".", 2)[2].encode()))
            noise = random.normal(0, 0.1, array.shape[1:]).astype(np.float32)
            values[name] = jax.device_put(np.broadcast_to(noise, array.shape), array.sharding)
    return values


def batch(rows: int = 4, length: int = 24) -> TokenBatch:
    tokens = oracle.random_tokens(3, 1, rows, length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    ones = np.ones(tokens.shape)
    return TokenBatch(tokens, positions, ones.astype(np.int32), ones.astype(np.float32))


def after_a_step(run: build.Run, values: dict[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    """Adapters after one step of plain gradient descent, by layer, and the loss."""
    tx = optax.sgd(RATE)
    shardings = build.shardings(build.abstract_state(run, tx))
    step = make_train_step(run.skeleton, run.objective, tx, RATE, 0, shardings)
    # A step takes over the memory of what it trains.
    trained = {name: jnp.array(values[name]) for name in run.trainable}
    state = build.initial_state(run, tx, trained)
    state, metrics = step(state, {name: values[name] for name in run.frozen}, run.put(batch()))
    layers = {}
    for name, array in state.trainable.items():
        stack, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", name).groups()
        for i, layer in enumerate(np.asarray(array)):
            layers[f"{sum(run.stacks[: int(stack)]) + i}.{rest}"] = layer
    return layers, float(metrics["loss"])


def dequantized(run: build.Run, values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: quant.dequantize(value, jnp.float32) if isinstance(value, QArray) else value
        for name, value in values.items()
    }


@functools.cache
def expected(formats: tuple[str, ...]) -> tuple[dict[str, np.ndarray], float]:
    """The step of a dense model that has the dequantized weights."""
    checkpoint = oracle.checkpoint_of(oracle.hf_llama(**SIZES))
    run = described(checkpoint, formats)
    return after_a_step(described(checkpoint, ()), dequantized(run, filled(run)))


def assert_same(result: tuple, wanted: tuple, tolerance: float) -> None:
    assert result[1] == pytest.approx(wanted[1], rel=1e-5)
    assert result[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert oracle.difference(result[0][name], value) < tolerance, name


@pytest.mark.parametrize(
    ("formats", "layers"),
    [(("nf4",), "unroll"), (("int4",), "scan"), (("int8_block",), "scan"), (MIX, "scan")],
)
def test_kernels_are_quantized_while_they_stream(dense: Checkpoint, formats: tuple, layers: str):
    run = described(dense, formats, layers=layers)
    values = build.fill_base(run, lambda done, total: None)
    names = build.quantized_kernels(run)
    for stack, size in enumerate(run.stacks):
        for i in range(size):
            layer = sum(run.stacks[:stack]) + i
            for ours, theirs in (
                ("mlp.up_proj", "mlp.up_proj"),
                ("attn.k_proj", "self_attn.k_proj"),
            ):
                name = f"layers.{stack}.{ours}.kernel"
                assert name in names
                kernel = jnp.asarray(dense.read(f"model.layers.{layer}.{theirs}.weight").T)
                format = formats[0] if len(formats) == 1 else ("nf4" if "mlp" in ours else "int8")
                wanted = quant.quantize(kernel, format, double_quant=format in ("nf4", "fp4"))
                got = jax.tree.map(lambda leaf, i=i: leaf[i], values[name])
                jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert not isinstance(values["embed.table"], QArray)
    assert isinstance(values["layers.0.attn.o_proj.kernel"], QArray) == (formats is not MIX)


@pytest.mark.parametrize(
    ("formats", "layers"),
    [
        pytest.param(("nf4",), "scan", marks=pytest.mark.slow),
        (("nf4",), "unroll"),
        (MIX, "scan"),
    ],
)
def test_a_step_is_that_of_the_dequantized_model(dense: Checkpoint, formats: tuple, layers: str):
    run = described(dense, formats, layers=layers)
    assert_same(after_a_step(run, filled(run)), expected(formats), tolerances.GRADIENTS)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(name, marks=() if name == "dots" else pytest.mark.slow)
        for name in REMAT
        if name != "none"
    ],
)
def test_recomputation_changes_nothing(dense: Checkpoint, remat: str):
    run = described(dense, ("nf4",), remat=remat)
    assert_same(after_a_step(run, filled(run)), expected(("nf4",)), tolerances.GRADIENTS)


@pytest.mark.parametrize("formats", [("nf4",), pytest.param(("int8",), marks=pytest.mark.slow)])
def test_eight_devices_are_one(dense: Checkpoint, formats: tuple):
    run = described(dense, formats, {"data": 2, "fsdp": 2, "tensor": 2})
    kernel = run.frozen["layers.0.mlp.up_proj.kernel"]
    assert kernel.codes.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert_same(after_a_step(run, filled(run)), expected(formats), tolerances.SHARDED)


def test_weights_travel_between_devices_as_codes(dense: Checkpoint):
    run = described(dense, ("nf4",), {"data": 1, "fsdp": 2, "tensor": 1})
    tx = optax.sgd(RATE)
    abstract = build.abstract_state(run, tx)
    step = make_train_step(run.skeleton, run.objective, tx, RATE, 0, build.shardings(abstract))
    text = step.lower(abstract, run.frozen, run.put(batch())).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather\(", text)
    bytes_moved = {shape for kind, shape in gathered if kind == "u8"}
    assert any(shape.endswith("64,256") for shape in bytes_moved), gathered
    for kind, shape in gathered:
        size = np.prod([int(n) for n in shape.split(",")])
        assert kind == "u8" or size < 128 * 256 // 2, (kind, shape)


def test_patterns_that_cannot_work(dense: Checkpoint):
    with pytest.raises(ConfigError, match=r"nf4=.*experts.* matches no layer"):
        described(dense, ("nf4=.*experts.*", "int8"))
    with pytest.raises(ConfigError, match="stacked in one array"):
        described(dense, ("nf4=layers.0.*", "int8"))
    described(dense, ("nf4=layers.0.*", "int8"), layers="unroll")
    narrow = oracle.checkpoint_of(oracle.hf_llama())
    with pytest.raises(ConfigError, match=r"layers.0.*32.*multiple"):
        described(narrow, ("nf4",))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_merged_export_is_that_of_peft_on_the_dequantized_base(dense: Checkpoint, tmp_path: Path):
    import peft
    import torch

    run = described(dense, MIX)
    values = filled(run)
    tokenizer = data.load_tokenizer("tiny:llama")
    write_adapter(run, values, tmp_path / "adapter")
    write_merged(run, values, tokenizer, tmp_path / "merged")
    base = oracle.hf_llama(**SIZES)
    kernels = dequantized(run, values)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            path = re.sub(r"model\.layers\.(\d+)\.", "layers.0.", name).replace("self_attn", "attn")
            path = path.removesuffix("weight") + "kernel"
            if path in build.quantized_kernels(run):
                layer = int(re.search(r"layers\.(\d+)", name)[1])
                parameter.copy_(torch.tensor(np.asarray(kernels[path][layer]).T))
    wanted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged = open_checkpoint(str(tmp_path / "merged"))
    for name, tensor in wanted.state_dict().items():
        assert oracle.difference(merged.read(name), tensor.numpy()) < 1e-6, name


def test_merging_into_the_original_base(dense: Checkpoint, tmp_path: Path):
    run = described(dense, ("nf4",))
    original = dataclasses.replace(run.config.checkpoint, merge_base="original")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, checkpoint=original))
    values = filled(run)
    write_merged(run, values, data.load_tokenizer("tiny:llama"), tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    name = "layers.0.mlp.down_proj"
    pair = values[f"{name}.adapter.a"][1] @ values[f"{name}.adapter.b"][1]
    weight = "model.layers.1.mlp.down_proj.weight"
    wanted = dense.read(weight).T + np.asarray(values[f"{name}.adapter.scale"][1] * pair)
    assert oracle.difference(merged.read(weight).T, wanted) < 1e-6


def test_merge_base_without_a_quantized_base_is_refused(dense: Checkpoint):
    run = described(dense, ())
    options = dataclasses.replace(run.config.checkpoint, merge_base="original")
    config = dataclasses.replace(run.config, checkpoint=options)
    with pytest.raises(ConfigError, match="not quantized"):
        build.describe(config, run.mesh, dense)
