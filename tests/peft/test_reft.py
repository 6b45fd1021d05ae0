"""ReFT: the paper's equation, pyreft's positions, torch with hooks, layouts, folders, runs."""

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
from jaxtune.checkpoint.adapter import load_adapter
from jaxtune.checkpoint.adapter_file import WEIGHTS_FILE
from jaxtune.checkpoint.adapter_slot import save_slot
from jaxtune.checkpoint.safetensors import read_header, read_tensor
from jaxtune.data.batch import TokenBatch, TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError, WeightError
from jaxtune.infer import Sampling, engine, generate
from jaxtune.infer.engine import score
from jaxtune.peft import reft
from jaxtune.schema import Data, Mesh, Model, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step
from jaxtune.train import train
from tests import oracle, test_train, tolerances

OPTIONS = {"method": "reft", "rank": 3, "reft_first_tokens": 2, "reft_last_tokens": 3}
FORMS = {
    "loreft": {},
    "direft": {"reft_form": "direft", "layers_to_transform": (0,)},
    "noreft": {"reft_form": "noreft", "reft_shared": True},
    "first": {"reft_last_tokens": 0},
}
STORED = ("rotate_layer", "weight", "bias")
LENGTHS, PROMPTS = (9, 7, 12), (5, 1, 8)  # of examples


def locations(prompt: int, options: dict) -> dict[str, list[int]]:
    """pyreft's get_intervention_locations, without its padding."""
    first = min(prompt // 2, options["reft_first_tokens"])
    last = min(prompt // 2, options["reft_last_tokens"])
    found = {"first": list(range(first)), "last": list(range(prompt - last, prompt))}
    return {"shared": found["first"] + found["last"]} if options.get("reft_shared") else found


def edited(h: Any, weights: dict[str, Any], form: str) -> Any:
    """The paper's equations for one hidden state h [D], with R [R, D] and W [R, D]."""
    rotate, weight, bias = weights["rotate"], weights["weight"], weights["bias"]
    if form == "direft":
        return h + rotate.T @ (weight @ h + bias)
    return h + rotate.T @ (weight @ h + bias - rotate @ h)


@pytest.fixture(scope="module")
def hf() -> Any:
    return oracle.hf_llama()


@pytest.fixture(scope="module")
def loaded(hf: Any) -> oracle.Loaded:
    return oracle.load(oracle.checkpoint_of(hf))


def adapted(loaded: oracle.Loaded, case: str = "loreft") -> oracle.Adapted:
    """A model with edits that are not as they start, nor orthonormal where they are stored."""
    found = oracle.adapt(loaded, Peft(**OPTIONS | FORMS[case]), b_std=0.5)
    random = np.random.default_rng(1)
    noisy = {n: x + random.normal(0, 0.1, x.shape).astype("f") for n, x in found.trainable.items()}
    return found._replace(trainable=noisy)


@pytest.mark.parametrize("case", FORMS)
def test_an_edit_is_the_equation_of_the_paper(case: str, loaded: oracle.Loaded):
    model = adapted(loaded, case)
    options, layer = OPTIONS | FORMS[case], 0
    h = np.random.default_rng(0).normal(size=(5, 12, 32)).astype(np.float32)
    prompts = np.array([0, 1, 3, 5, 12])

    @jax.jit
    def edit(h: Any, trainable: tree.Params) -> tuple:
        filled = model.skeleton.model({**model.frozen, **trainable})
        values = jax.tree.map(lambda x: x[layer], filled.edit.values())
        places = filled.edit.places(jnp.arange(12)[None], prompts[:, None])
        return filled.edit(h, values, places), reft.stored(filled)

    found, stored = edit(h, model.trainable)
    expected = h.astype(np.float64)
    for row, prompt in enumerate(prompts):
        for part, tokens in locations(prompt, options).items():
            for t in tokens:
                at = f"layers.{layer}.{part}"
                weights = {n: np.asarray(stored[f"{at}.{n}"], np.float64) for n in STORED}
                weights["rotate"] = weights.pop("rotate_layer").T
                if case != "noreft":
                    gram = weights["rotate"] @ weights["rotate"].T
                    np.testing.assert_allclose(gram, np.eye(3), atol=1e-6)
                form = options.get("reft_form", "loreft")
                expected[row, t] = edited(expected[row, t], weights, form)
    assert oracle.difference(found, expected) <= tolerances.OPS_LONG_SUMS
    assert len(stored) == len(model.trainable) * len(options.get("layers_to_transform", (0, 1)))


def examples() -> list[TokenRow]:
    return [
        TokenRow(oracle.random_tokens(i, length), np.arange(length) >= prompt)
        for i, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True))
    ]


def torch_loss(hf: Any, variables: dict[str, np.ndarray], options: dict) -> tuple[float, dict]:
    """Sum of losses of the examples one by one, edits made by hooks; gradients by name."""
    import torch

    leaves = {n: torch.tensor(np.asarray(x), requires_grad=True) for n, x in variables.items()}
    form, total = options.get("reft_form", "loreft"), torch.zeros(())
    chosen = options.get("layers_to_transform", (0, 1))

    def hook(i: int, prompt: int) -> Any:
        def edit(module: Any, given: Any, output: Any) -> Any:
            rows = list(output[0])
            for part, tokens in locations(prompt, options).items():
                for t in tokens:
                    leaf = {n: leaves[f"edit.parts.{part}.{n}"][i] for n in LEAVES}
                    rotate = leaf["basis"]
                    if form != "noreft":
                        q, u = torch.linalg.qr(rotate)
                        rotate = q * u.diagonal().sign()
                    weights = {"rotate": rotate.T, "weight": leaf["weight"].T, "bias": leaf["bias"]}
                    rows[t] = edited(rows[t], weights, form)
            return torch.stack(rows)[None]

        return edit

    for row, prompt in zip(examples(), PROMPTS, strict=True):
        hooks = [
            hf.model.layers[layer].register_forward_hook(hook(i, prompt))
            for i, layer in enumerate(chosen)
        ]
        tokens = torch.tensor(row.tokens).long()
        logits = hf(tokens[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        total = total + losses[torch.tensor(row.trained[1:])].sum()
        for handle in hooks:
            handle.remove()
    total.backward()
    return float(total.detach()), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


LEAVES = ("basis", "weight", "bias")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "loreft" else pytest.mark.slow) for c in FORMS]
)
@pytest.mark.parametrize("layers", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
def test_packed_prompts_are_edited_as_each_alone_in_torch(case: str, layers: str, hf: Any):
    model = adapted(oracle.load(oracle.checkpoint_of(hf), layers=layers), case)

    @jax.jit
    @jax.value_and_grad
    def loss(trainable: tree.Params, batch: TokenBatch) -> jax.Array:
        filled = model.skeleton.model({**model.frozen, **trainable})
        return objectives.OBJECTIVES["sft"](filled, batch, loss_dtype=jnp.float32)[0]

    found, gradients = loss(model.trainable, stack_rows([examples()], 32))
    expected, theirs = torch_loss(hf, model.trainable, OPTIONS | FORMS[case])
    assert float(found) == pytest.approx(expected, rel=tolerances.LOSS_CURVE)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 0
        assert oracle.difference(gradients[name], gradient) <= tolerances.GRADIENTS, name


def test_generation_edits_the_prompt_only(loaded: oracle.Loaded, monkeypatch: pytest.MonkeyPatch):
    """With a cache, prompts read in two pieces, and without one: the same tokens."""
    monkeypatch.setattr(engine, "PIECE", 8)
    model = adapted(loaded)
    params = {**model.frozen, **model.trainable}
    prompts = [oracle.random_tokens(1, 13).tolist(), oracle.random_tokens(2, 4).tolist()]
    found = generate(
        model.skeleton, params, prompts, max_new_tokens=5, eos_ids=(), sampling=Sampling()
    )

    @jax.jit
    def last(tokens: Any, length: Any, prompt: Any) -> jax.Array:
        filled, positions = model.skeleton.model(params), jnp.arange(18)[None]
        hidden, _ = filled.hidden(tokens, positions, None, prompts=prompt[None, None])
        return filled.logits(hidden[0, length - 1])

    for prompt, answer in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(5):
            padded = np.pad(row, (0, 18 - len(row)))[None]
            logits = last(padded, len(row), jnp.int32(len(prompt)))
            plain = last(padded, len(row), jnp.int32(0))
            assert oracle.difference(logits, plain) > 0.01
            row.append(int(logits.argmax()))
        assert row[len(prompt) :] == answer


@pytest.mark.parametrize("case", FORMS)
def test_folders_hold_what_acts(case: str, hf: Any, loaded: oracle.Loaded, tmp_path: Path):
    model, tokens = adapted(loaded, case), oracle.random_tokens(1, 2, 9)
    arrays = reft.stored(model.skeleton.model({**model.frozen, **model.trainable}))
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    save_slot(tmp_path, arrays, model.adapters, base="random")
    shapes, rest = loaded.skeleton.abstract(), (loaded.weights, loaded.stacks)
    base = oracle.checkpoint_of(hf)
    again = load_adapter(tmp_path, shapes, *rest, base=base)
    assert again.adapters == model.adapters
    assert again.params.keys() == model.trainable.keys()
    if case == "loreft":
        seen = np.ones_like(tokens, bool)
        found, expected = (
            score(model.skeleton, {**model.frozen, **jax.tree.map(jnp.asarray, own)}, tokens, seen)
            for own in (again.params, model.trainable)
        )
        assert oracle.difference(found, expected) <= tolerances.LOGITS
        skewed = arrays | {"layers.0.last.rotate_layer": arrays["layers.0.last.rotate_layer"] * 1.1}
        save_slot(tmp_path, skewed, model.adapters, base="random")
        with pytest.raises(WeightError, match="layers.0.last.rotate_layer has no orthonormal col"):
            load_adapter(tmp_path, shapes, *rest, base=base)
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"layers_to_transform": [2]}))
    with pytest.raises(ConfigError, match="the model has layers 0 to 1"):
        load_adapter(tmp_path, shapes, *rest, base=base)
    config.write_text(json.dumps(fields | {"positions": "l+f"}))
    with pytest.raises(WeightError, match="positions='l\\+f'"):
        load_adapter(tmp_path, shapes, *rest, base=base)


def after_steps(hf: Any, mesh: dict[str, int]) -> tuple[dict, list[float]]:
    """What trains after two steps on a batch of packed rows, and the losses."""
    config = RunConfig(
        model=Model(remat="full"),
        peft=Peft(**OPTIONS),
        data=Data(train=("rows.jsonl",), max_seq_len=32),
        mesh=Mesh(**mesh),
        train=Train(micro_batch_size=8 // (mesh.get("data", 1) * mesh.get("fsdp", 1))),
    )
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    run = build.describe(config, make_mesh(config.mesh.axes(), devices), oracle.checkpoint_of(hf))
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    rate = optax.constant_schedule(0.3)
    tx = optax.sgd(rate)
    places = build.shardings(build.abstract_state(run, tx))
    step = make_train_step(run.skeleton, run.objective, tx, rate, 0, places)
    state = build.initial_state(run, tx, values)
    frozen, losses = {name: values[name] for name in run.frozen}, []
    rows = [examples()[i % 3 :] for i in range(8)]
    batch = run.put(jax.tree.map(lambda leaf: leaf[None], stack_rows(rows, 32)))
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return {name: np.asarray(array) for name, array in state.trainable.items()}, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"stage": 2, "fsdp": 2, "sequence": 2},
        {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
        {"stage": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_meshes_train_alike(mesh: dict[str, int], hf: Any):
    expected, losses = after_steps(hf, {"data": 1, "fsdp": 1})
    assert losses[1] < losses[0]
    found, sharded = after_steps(hf, mesh)
    assert sharded == pytest.approx(losses, rel=tolerances.SHARDED)
    for name, array in expected.items():
        assert oracle.difference(found[name], array) <= tolerances.SHARDED * 2, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": {"alpha": 8.0}}, "alpha=8.0 would be ignored"),
        ({"peft": {"dropout": 0.1}}, "dropout=0.1 would be ignored"),
        ({"peft": {"reft_first_tokens": 0, "reft_last_tokens": 0}}, "nothing is edited"),
        ({"peft": {"reft_first_tokens": 0, "reft_shared": True}}, "reft_shared=True would be"),
        (
            {"peft": {"layers_to_transform": (0, 9)}},
            "layers_to_transform=0,9: the model has layers",
        ),
        ({"peft": {"rank": 4096}}, "no more directions are orthonormal"),
        ({"data": {"train_on": "all"}}, "nothing before what is trained"),
        ({"data": {"packer": "concat"}}, "edits the prompt of every example"),
        ({"checkpoint": {"export_merged": True}}, "nothing to merge"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str, tmp_path: Path):
    sections = {"peft": {"method": "reft"}}
    for name, fields in changes.items():
        sections[name] = sections.get(name, {}) | fields
    with pytest.raises(ConfigError, match=message):
        train(test_train.run_config(tmp_path, "run", **sections))


def test_rows_without_a_prompt_are_refused(tmp_path: Path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "red blue red blue"}\n' * 8)
    sections = {"peft": {"rank": 4, "method": "reft"}, "data": {"train": (str(text),), "eval": ()}}
    with pytest.raises(ConfigError, match="the training rows have none"):
        train(test_train.run_config(tmp_path, "run", **sections))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [(), ("int8",)])
def test_a_run_from_start_to_answers(quantized: tuple, tmp_path: Path):
    """Trains, stops, goes on bit for bit, and its folder answers as the run did."""
    sections = {
        "peft": {"method": "reft", "layers_to_transform": (0,)},
        "eval": {"exact_match": True, "max_rows": 2, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "mesh": {"fsdp": 4, "tensor": 2},
        "quant": {"format": quantized},
    }
    whole = train(test_train.run_config(tmp_path, "whole", **sections))
    file = whole.paths["adapter"] / WEIGHTS_FILE
    tensors = {name: read_tensor(place) for name, place in read_header(file).items()}
    assert len(tensors) == 6
    samples = [json.loads(line) for line in whole.paths["samples"].read_text().splitlines()]
    model = jaxtune.load("tiny:llama", adapter=whole.paths["adapter"])
    prompts = [[{"role": "user", "content": sample["prompt"]}] for sample in samples]
    if not quantized:
        assert model.generate(prompts, max_new_tokens=4) == [s["answer"] for s in samples]
    sections["checkpoint"] |= {"resume": "2"}
    train(test_train.run_config(tmp_path, "whole", **sections))
    for name, place in read_header(file).items():
        np.testing.assert_array_equal(read_tensor(place), tensors[name])
