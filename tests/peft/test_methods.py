"""What holds for every method of the table."""

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import build, peft, residual
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data import TokenBatch
from jaxtune.errors import ConfigError
from jaxtune.exports import write_adapter, write_base, write_merged
from jaxtune.peft import layer_names
from jaxtune.schema import Data, Model, Peft, Quant, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from jaxtune.train import train
from tests import oracle, tolerances
from tests.test_train import run_config

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "rank_pattern": ("layers.0.attn.v_proj=2",)},
    "dora": {"rank": 4},
    "moslora": {"rank": 4},
    "mora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2, "decompose_both": True},
    "adalora": {"rank": 4, "target_rank": 2},
    "vera": {"rank": 8},
    "ia3": {},
    "oft": {"block_size": 8},
    "tokens": {"trainable_tokens": (64, 2)},
    "reft": {"rank": 4, "reft_first_tokens": 2},
    "lora, bias and tokens": {
        "method": "lora",
        "rank": 4,
        "lora_bias": True,
        "trainable_tokens": (64, 2),
    },
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"},
    "loftq": {"method": "lora", "rank": 4, "init": "loftq"},
    "loftq, iterated": {"method": "lora", "rank": 4, "init": "loftq", "loftq_iterations": 3},
    "lora, embedding": {"method": "lora", "rank": 4, "target_modules": ("embed", "down_proj")},
    "dora, embedding": {"method": "dora", "rank": 4, "target_modules": ("embed", "down_proj")},
}
ADAPTERS = list(OPTIONS)
PROMPTS = {"prefix", "prompt", "p_tuning"}  # have tests of their own (test_prompts.py)
# Those that start as a part of the base have tests of their own (test_split.py).
SPLIT = ("pissa", "loftq", "loftq, iterated")
# LoftQ starts near the base: how far its loss may be off. It has a quantized base always; PiSSA is
# the same adapter on a dense one.
NEAR = {"loftq": 1e-2, "loftq, iterated": 1e-2}
DENSE = dict.fromkeys(NEAR, "pissa")
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
RATE = optax.constant_schedule(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full", "rank": 4}, "peft.rank=4 would be ignored: peft.method=full"),
        ({"method": "full", "adapter": "folder"}, "peft.adapter='folder' would be ignored"),
        ({"method": "ia3", "alpha": 1.0}, "peft.alpha=1.0 would be ignored: peft.method=ia3"),
        ({"block_size": 8}, "peft.block_size=8 would be ignored: peft.method=lora"),
        ({"method": "loha", "trainable_tokens": (1,)}, "trainable_tokens=(1,) would be ignored"),
        ({"adapter": "folder", "alpha": 3.0}, "peft.alpha=3.0 would be ignored: peft.adapter bri"),
        ({"adapter": "folder", "layers_to_transform": (1,)}, "layers_to_transform=(1,) would be"),
    ],
)
def test_options_that_a_method_does_not_read_are_named(options: dict, message: str):
    (problem,) = peft.unread(Peft(**options))
    assert message in problem


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"adapter": "folder", "dropout": 0.1}])
def test_options_that_are_read_are_no_problem(options: dict):
    assert peft.unread(Peft(**options)) == []


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return oracle.checkpoint_of(oracle.hf_llama(hidden_size=128, intermediate_size=256))


def described(
    base: Checkpoint,
    method: str,
    *,
    mesh: dict[str, int] = ONE,
    layers: str = "scan",
    quantized: tuple[str, ...] = (),
    **options: Any,
) -> build.Run:
    own = {} if "adapter" in options else OPTIONS.get(method, {})
    needed = ("int8",) if method in NEAR else ()
    config = RunConfig(
        model=Model(layers=layers, remat="none"),
        quant=Quant(format=quantized or needed),
        peft=Peft(**{"method": method} | options | own),
        data=Data(train=("rows.jsonl",)),
    )
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return build.describe(config, make_mesh(mesh, devices), base)


def test_every_adapter_has_a_case():
    adapters = {n for n in peft.METHODS if peft.is_adapter(n)}
    assert adapters - PROMPTS <= set(ADAPTERS)


def parts(run: build.Run, name: str) -> dict[str, tuple]:
    """Of each layer, the part of its stack's array that it uses; at smaller ranks the rest is 0."""
    if peft.fills_one_slot(run.adapters.method):
        return {name: (...,)}
    path, leaf = name.split(".adapter.")
    widths = run.frozen[peft.weight_name(path)].shape[-2:]
    method, found = peft.module_of(run.adapters, path), {}
    for index, (number, layer) in enumerate(layer_names(path, run.stacks)):
        own = method.tensors(run.adapters.layers[path][index], *widths)[leaf].shape
        place = () if number is None else (index,)
        found[f"{layer}.{leaf}"] = (*place, *map(slice, own))
    return found


def filled(run: build.Run, *, noise: float) -> dict[str, Any]:
    """All parameters; normal noise is added to what trains, to each layer its own."""
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    for name in run.trainable if noise else ():
        array = np.array(values[name])
        for layer, own in parts(run, name).items():
            random = np.random.default_rng(zlib.crc32(layer.encode()))
            array[own] += random.normal(0, noise, array[own].shape)
        values[name] = jax.device_put(array, values[name].sharding)
    return values


def batch() -> TokenBatch:
    tokens = oracle.random_tokens(3, 1, 4, 16)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    ones = np.ones(tokens.shape)
    return TokenBatch(tokens, positions, ones.astype(np.int32), (positions > 5).astype(np.float32))


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in SPLIT else ()) for m in ADAPTERS],
)
def test_a_new_adapter_is_the_base_and_all_of_it_can_learn(base: Checkpoint, method: str):
    targeted = peft.Targets in peft.METHODS[OPTIONS[method].get("method", method)].READS
    some = {"target_modules": ("v_proj", "down_proj")} if targeted else {}
    run = described(base, method, **some)
    values, start = filled(run, noise=0.2), filled(run, noise=0.0)
    micro = jax.tree.map(lambda leaf: leaf[0], batch())

    @jax.jit
    def gradient(trainable: Any, frozen: Any) -> Any:
        model = lambda learning: run.skeleton.model({**frozen, **learning})  # noqa: E731
        return jax.value_and_grad(lambda learning: run.objective(model(learning), micro)[0])(
            trainable
        )

    frozen = {name: values[name] for name in run.frozen}
    plain = described(base, "full")
    expected = plain.objective(plain.skeleton.model(filled(plain, noise=0.0)), micro)[0]
    loss, _ = gradient({name: start[name] for name in run.trainable}, frozen)
    near = NEAR.get(method, tolerances.LOGITS)
    # An edit of hidden states begins as another model, as in pyreft.
    is_base = abs(float(loss) - float(expected)) <= near * float(expected)
    assert is_base == (method != "reft")
    start_loss = float(loss)
    loss, grads = gradient({name: values[name] for name in run.trainable}, frozen)
    assert abs(float(loss) - start_loss) > 1e-4 * start_loss
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        assert all(np.asarray(grad[own]).any() for own in parts(run, name).values()), name


def after_a_step(run: build.Run) -> tuple[dict[str, np.ndarray], float]:
    """What trains after one step of plain gradient descent, by layer, and the loss; the frozen
    parameters must keep their bytes."""
    values = filled(run, noise=0.05)
    tx = optax.sgd(RATE)
    shardings = build.shardings(build.abstract_state(run, tx))
    step = make_train_step(run.skeleton, run.objective, tx, RATE, 0, shardings)
    frozen = {name: values[name] for name in run.frozen}
    before = {name: [np.array(x) for x in jax.tree.leaves(v)] for name, v in frozen.items()}
    # A step takes over the memory of what it trains.
    trained = {name: jnp.array(values[name]) for name in run.trainable | run.taken}
    state, metrics = step(build.initial_state(run, tx, trained), frozen, run.put(batch()))
    for name, leaves in before.items():
        for x, y in zip(leaves, jax.tree.leaves(frozen[name]), strict=True):
            assert x.tobytes() == np.asarray(y).tobytes(), name
    layers = {}
    for name, array in state.trainable.items():
        assert (np.asarray(array) != np.asarray(values[name])).any(), name
        layers |= {layer: np.asarray(array[own]) for layer, own in parts(run, name).items()}
    return layers, float(metrics["loss"])


def assert_same(found: tuple, expected: tuple, tolerance: float) -> None:
    assert abs(found[1] - expected[1]) <= tolerance * expected[1]
    assert set(found[0]) == set(expected[0])
    for name, array in expected[0].items():
        assert oracle.difference(found[0][name], array) <= tolerance, name


def loss_of(run: build.Run, values: dict[str, Any]) -> float:
    micro = jax.tree.map(lambda leaf: leaf[0], batch())
    own = {name: values[name] for name in run.skeleton.abstract()}
    return float(jax.jit(lambda own: run.objective(run.skeleton.model(own), micro)[0])(own))


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in ADAPTERS if m != "reft"])  # that cannot be merged
def test_folders_and_merged_models_are_the_adapter(base: Checkpoint, method: str, tmp_path: Path):
    run = described(base, method)
    values = filled(run, noise=0.05)
    loss = loss_of(run, values)
    assert abs(loss - loss_of(run, filled(run, noise=0.0))) > 1e-4 * loss

    write_adapter(run, values, tmp_path / "adapter")
    own = base
    if residual.has_own_base(run):
        write_base(run, values, None, tmp_path / "base")
        own = open_checkpoint(str(tmp_path / "base"))
    read = {"adapter": str(tmp_path / "adapter"), "quantized": run.config.quant.format}
    again = described(own, run.config.peft.method, **read)
    assert abs(loss_of(again, filled(again, noise=0.0)) - loss) <= tolerances.LOGITS * loss

    if run.config.peft.lora_bias:
        with pytest.raises(ConfigError, match="has no bias into which"):
            write_merged(run, values, None, tmp_path / "merged")
        return
    write_merged(run, values, None, tmp_path / "merged")
    whole = described(open_checkpoint(str(tmp_path / "merged")), "full")
    assert abs(loss_of(whole, filled(whole, noise=0.0)) - loss) <= tolerances.LOGITS * loss


# How runs of the laws below begin; lisa, badam and llama_pro have their own (test_turns.py,
# test_trained.py), as have prompts (test_prompts.py).
RUNS = OPTIONS | {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "trainable_layers": 1},
    "bitfit": {"method": "bitfit"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", RUNS)
def test_a_resumed_run_is_an_uninterrupted_one(method: str, tmp_path: Path):
    sections: dict[str, Any] = {
        "peft": {"rank": Peft().rank, "method": method} | RUNS[method],
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "model": {"path": "tiny:gpt2" if method == "bitfit" else "tiny:llama"},
        "quant": {"format": ("int8",) if method in NEAR else ()},
    }

    def trained() -> bytes:
        paths = train(run_config(tmp_path, "run", **sections)).paths
        folder = paths["adapter"] if "adapter" in paths else paths["merged"]
        (file,) = folder.glob("*.safetensors")
        found = file.read_bytes()
        file.unlink()
        return found

    whole = trained()
    sections["checkpoint"] |= {"resume": "2"}
    assert trained() == whole


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTERS)
def test_layouts_and_meshes_train_alike(base: Checkpoint, method: str):
    expected = after_a_step(described(base, method))
    assert_same(after_a_step(described(base, method, layers="unroll")), expected, 2e-5)
    for mesh in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}):
        found = after_a_step(described(base, method, mesh=mesh))
        assert_same(found, expected, tolerances.SHARDED * 2)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_quantized_bases_train_in_all_layouts(base: Checkpoint, method: str, format: str):
    expected = after_a_step(described(base, method, quantized=(format,)))
    dense, _ = after_a_step(described(base, DENSE.get(method, method)))
    assert any(oracle.difference(expected[0][name], dense[name]) > 1e-6 for name in dense)
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    found = after_a_step(described(base, method, quantized=(format,), mesh=mesh))
    assert_same(found, expected, tolerances.SHARDED * 2)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "dora",
            {"trainable_tokens": (97,)},
            "97 comes twice, or is not among the model's ids 0 to 96",
        ),
        ("dora", {"trainable_tokens": (5, 5)}, "5 comes twice"),
        ("loha", {"target_modules": ("embed",)}, "peft.method=loha has no form for the embedding"),
        ("dora", {"trainable_tokens": (5,), "modules_to_save": ("lm_head",)}, "lm_head is adapted"),
        ("dora", {"rank_pattern": ("c_attn=8",)}, "rank_pattern: c_attn matches no adapted layer"),
        ("dora", {"rank_pattern": ("q_proj",)}, "'q_proj' is not of the form pattern=8"),
        ("dora", {"alpha_pattern": ("q_proj=x",)}, "'q_proj=x' is not of the form pattern=8.0"),
    ],
)
def test_targets_and_patterns_that_do_not_fit_are_refused(
    base: Checkpoint, method: str, options: dict, message: str
):
    with pytest.raises(ConfigError, match=message):
        described(base, method, **options)
