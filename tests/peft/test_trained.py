"""Methods that train a part of the model's own weights: which, how far gradients go, exports."""

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
from jaxtune import build, objectives, tree
from jaxtune.checkpoint.expand import expanded
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError
from jaxtune.meter import flops_per_token
from jaxtune.models import llama
from jaxtune.quant import QArray
from jaxtune.schema import Checkpoint, Data, Log, Model, Optim, Peft, Quant, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from tests import oracle, tolerances
from tests.oracle import difference

ONE, EIGHT = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
OBJECTIVE = functools.partial(objectives.OBJECTIVES["sft"], loss_dtype=jnp.float32)
RATE = optax.constant_schedule(0.5)


def describe(
    mesh: dict[str, int] = ONE, model: Any = None, quant: Any = None, **peft: Any
) -> build.Run:
    config = RunConfig(
        model=Model(**{"layers": "scan"} | (model or {})),
        peft=Peft(**peft),
        quant=Quant(**quant or {}),
        data=Data(train=("rows.jsonl",)),
    )
    checkpoint = open_checkpoint("tiny:llama")
    if peft["method"] == "bitfit":
        biased = checkpoint.config | {"attention_bias": True}
        checkpoint = dataclasses.replace(checkpoint, config=biased)
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return build.describe(config, make_mesh(mesh, devices), checkpoint)


# Options, layers in each stack, and what the names of all trained parameters begin with.
CASES = [
    ({"method": "freeze", "trainable_layers": 1}, (2, 1), ["layers.1."]),
    ({"method": "freeze", "trainable_layers": -1}, (1, 2), ["layers.0."]),
    ({"method": "freeze", "trainable_layers": 3}, (3,), ["layers.0."]),
    (
        {"method": "freeze", "trainable_modules": ("mlp", "attn.q_proj")},
        (1, 2),
        ["layers.1.mlp.", "layers.1.attn.q_proj."],
    ),
    (
        {"method": "freeze", "trainable_layers": 0, "extra_modules": ("embed", "lm_head")},
        (3,),
        ["embed.", "lm_head."],
    ),
    ({"method": "llama_pro", "new_layers": 1}, (3, 1), ["layers.1."]),
    ({"method": "llama_pro", "new_layers": 3}, (1,) * 6, ["layers.1.", "layers.3.", "layers.5."]),
]


@pytest.mark.parametrize(("options", "stacks", "prefixes"), CASES, ids=str)
def test_what_trains(options: dict[str, Any], stacks: tuple, prefixes: list[str]):
    run = describe(model={"param_dtype": "bfloat16"}, **options)
    assert run.stacks == stacks
    assert all(name.startswith(tuple(prefixes)) for name in run.trainable)
    assert not any(name.startswith(tuple(prefixes)) for name in run.frozen)
    assert len(run.trainable) >= len(prefixes)
    assert {leaf.dtype for leaf in run.trainable.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in run.frozen.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("options", [CASES[0][0], CASES[5][0]], ids=str)
def test_the_same_trains_in_an_unrolled_model(options: dict[str, Any]):
    scanned, unrolled = (describe(model={"layers": how}, **options) for how in ("scan", "unroll"))
    assert len(unrolled.stacks) == sum(scanned.stacks)
    assert tree.count(unrolled.trainable) == tree.count(scanned.trainable)


def test_flops_are_counted_from_the_first_trained_layer_on():
    """tiny:llama has 9216 weights in a layer's matrices and 259 x 32 in its head."""
    layer, head = 9216, 259 * 32
    for options, expected in (
        ({"method": "full"}, 6 * (3 * layer + head)),
        ({"method": "freeze", "trainable_layers": 1}, 2 * 2 * layer + 6 * layer + 4 * head),
        ({"method": "freeze", "trainable_layers": -1}, 6 * layer + 4 * (2 * layer + head)),
        ({"method": "badam", "active_layers": 1}, 6 * layer + 4 * (2 * layer + head)),
    ):
        assert flops_per_token(describe(**options), 0) == expected, options


def test_bitfit_trains_the_biases():
    run = describe(method="bitfit")
    assert {name.rsplit(".", 1)[1] for name in run.trainable} == {"bias"}
    assert len(run.trainable) == 4 and not any(name.endswith(".bias") for name in run.frozen)


def test_frozen_layers_may_be_quantized():
    run = describe(method="freeze", trainable_layers=1, quant={"format": ("int8",)})
    coded = {name for name, leaf in run.frozen.items() if isinstance(leaf, QArray)}
    assert len(coded) == 7 and all(name.startswith("layers.0.") for name in coded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "freeze", "trainable_layers": 4}, "the model has 3 layers"),
        ({"method": "freeze", "trainable_layers": 0}, "trains nothing"),
        ({"method": "freeze", "trainable_modules": ("mpl",)}, "'mpl' matches none of attn.k_proj"),
        ({"method": "freeze", "extra_modules": ("head",)}, "'head' matches none of embed, lm_head"),
        ({"method": "llama_pro", "new_layers": 2}, "does not divide the model's 3 layers"),
        ({"method": "full", "trainable_layers": 1}, "would be ignored: peft.method=full"),
        ({"method": "freeze", "mesh": {"stage": 3, **ONE}}, "layers that are alike"),
        ({"method": "freeze", "trainable_layers": 3, "quant": {"format": ("int8",)}}, "trains all"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        describe(**options)


def test_a_model_without_biases_is_refused_by_bitfit():
    config = RunConfig(peft=Peft(method="bitfit"), data=Data(train=("rows.jsonl",)))
    mesh = make_mesh(ONE, jax.devices()[:1])
    with pytest.raises(ConfigError, match="the model has no biases"):
        build.describe(config, mesh, open_checkpoint("tiny:llama"))


def make_batch() -> Any:
    random = np.random.default_rng(0)
    rows = [
        [TokenRow(random.integers(0, 259, n).astype(np.int32), np.arange(n) > 2)]
        for n in (20, 24, 9, 15)
    ]
    return jax.tree.map(lambda leaf: leaf[None], stack_rows(rows, 24))


BATCH = make_batch()


def fill(run: build.Run) -> tuple[Any, Any]:
    values = build.fill_base(run, lambda done, total: None)
    frozen = {name: values[name] for name in run.frozen}
    return {name: np.asarray(values[name]) for name in run.trainable}, frozen


def stepped(run: build.Run) -> tuple[dict, dict, float]:
    """Trained parameters before and after one step of gradient descent, and its loss."""
    before, frozen = fill(run)
    tx, kept = optax.sgd(RATE), {name: np.asarray(leaf).tobytes() for name, leaf in frozen.items()}
    placed = {n: jax.device_put(x, run.trainable[n].sharding) for n, x in before.items()}
    shardings = build.shardings(build.abstract_state(run, tx))
    step = make_train_step(run.skeleton, OBJECTIVE, tx, RATE, 0, shardings)
    state, metrics = step(build.initial_state(run, tx, placed), frozen, run.put(BATCH))
    assert kept == {name: np.asarray(leaf).tobytes() for name, leaf in frozen.items()}
    after = {name: np.asarray(leaf) for name, leaf in state.trainable.items()}
    return before, after, float(metrics["loss"])


@pytest.fixture(scope="module")
def full() -> tuple[dict, dict, float]:
    return stepped(describe(method="full"))


def test_the_last_layers_learn_what_they_learn_in_full_tuning(full: tuple):
    """On eight devices, and with the head; everything else keeps its bytes."""
    extra = {"extra_modules": ("lm_head",)}
    before, after, loss = stepped(describe(EIGHT, method="freeze", trainable_layers=2, **extra))
    assert loss == pytest.approx(full[2], rel=1e-6) and len(after) == 10
    for name, array in after.items():
        whole = name.replace("layers.1.", "layers.0.")
        last = slice(1, 3) if name != whole else slice(None)
        assert (array != before[name]).any(), name
        assert difference(array - before[name], (full[1][whole] - full[0][whole])[last]) <= 2e-5


def products(run: build.Run) -> int:
    """Matrix products of a gradient, those in a loop as often as it runs."""

    def is_jaxpr(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def count(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            values = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
            inner = sum(count(getattr(v, "jaxpr", v)) for v in values if is_jaxpr(v))
            total += (eqn.primitive.name == "dot_general") + inner * eqn.params.get("length", 1)
        return total

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        micro = jax.tree.map(lambda leaf: leaf[0], BATCH)
        return OBJECTIVE(run.skeleton.model({**frozen, **trainable}), micro)[0]

    return count(jax.make_jaxpr(jax.grad(loss))(run.trainable, run.frozen).jaxpr)


def test_gradients_stop_at_the_first_trained_layer():
    """Layers below the first trained one have no product of a backward pass."""
    head, one, two = (
        products(describe(method="freeze", trainable_layers=n, extra_modules=("lm_head",)))
        for n in (0, 1, 2)
    )
    first = products(describe(method="freeze", trainable_layers=-1, extra_modules=("lm_head",)))
    # A trained layer: the gradients of seven kernels, and of the inputs of four products or more.
    assert one - head >= 11 and abs((two - one) - (one - head)) <= 2
    # The first layer alone needs the gradient of the output of both that are above it.
    assert first - one >= 2 * 7


def test_expanded_checkpoints_add_nothing_at_first():
    model = oracle.hf_llama(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    base = oracle.checkpoint_of(model)
    origins = ((0, False), (1, False), (1, True), (2, False), (3, False), (3, True))
    deeper = expanded(base, llama.weights(llama.Config.from_hf(base.config)), origins)
    assert deeper.config["num_hidden_layers"] == 6
    tokens = oracle.random_tokens(0, 2, 12)
    got = oracle.logits(oracle.load(deeper), tokens)
    assert difference(got, oracle.hf_logits(model, tokens)) <= tolerances.LOGITS
    copy = deeper.read("model.layers.5.mlp.up_proj.weight")
    assert (copy == base.read("model.layers.3.mlp.up_proj.weight")).all() and copy.any()


def config_of(folder: Path, name: str, num_steps: int) -> RunConfig:
    rows = [{"instruction": f"Say {i}.", "output": f"{i} {i}"} for i in range(12)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        peft=Peft(method="llama_pro", new_layers=3),
        data=Data(train=(str(file),), max_seq_len=64, packing=False),
        optim=Optim(learning_rate=1e-2, schedule="constant"),
        train=Train(
            output_dir=str(folder / name),
            num_steps=num_steps,
            micro_batch_size=1,
            compilation_cache="",
        ),
        checkpoint=Checkpoint(every_steps=1),
        log=Log(tensorboard=False, plot=False),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_llama_pro_resumes_and_is_exported_as_a_deeper_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import transformers

    whole = jaxtune.train(config_of(tmp_path, "whole", 3))
    jaxtune.train(config_of(tmp_path, "parts", 1))
    parts = jaxtune.train(config_of(tmp_path, "parts", 3))
    assert "train.num_steps was 1 and is 3" in capsys.readouterr().err
    merged, again, base = (
        open_checkpoint(path)
        for path in (str(whole.paths["merged"]), str(parts.paths["merged"]), "tiny:llama")
    )
    assert merged.config["num_hidden_layers"] == 6
    for name in merged.tensors:
        assert merged.read(name).tobytes() == again.read(name).tobytes(), name
        if match := llama_layer(name):
            layer, rest = match
            old = base.read(f"model.layers.{layer // 2}.{rest}")
            assert (merged.read(name) == old).all() == (layer % 2 == 0), name
        else:
            assert (merged.read(name) == base.read(name)).all(), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole.paths["merged"])
    tokens = oracle.random_tokens(0, 2, 12, vocab=259)
    got = oracle.logits(oracle.load(merged), tokens)
    assert difference(got, oracle.hf_logits(theirs, tokens)) <= tolerances.LOGITS


def llama_layer(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.x` -> (3, `mlp.x`)."""
    if not name.startswith("model.layers."):
        return None
    index, rest = name.removeprefix("model.layers.").split(".", 1)
    return int(index), rest
