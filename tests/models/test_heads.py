"""Encoders, and heads for labels on encoders and decoders, against transformers and PEFT."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxtune import models
from jaxtune.checkpoint.adapter import load_adapter, save_adapter
from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.labels import with_labels
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data.batch import TokenBatch
from jaxtune.errors import ConfigError, WeightError
from jaxtune.models.heads import TASKS, head_of, label_logits
from jaxtune.objectives import OBJECTIVES
from jaxtune.schema import LABELLED, Objective, Peft, RunConfig
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import make_mesh
from tests import oracle, tolerances

SEQUENCE, TOKENS, SPANS = LABELLED
ONE, SOME, SCORES = "single_label_classification", "multi_label_classification", "regression"
LENGTH = 20

# Family, task, problem, fields of config.json besides TINY's.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bert-one": ("bert", SEQUENCE, ONE, {}),
    "bert-some": ("bert", SEQUENCE, SOME, {"hidden_act": "gelu_new"}),
    "bert-scores": ("bert", SEQUENCE, SCORES, {"hidden_act": "relu", "num_hidden_layers": 2}),
    "bert-tokens": ("bert", TOKENS, ONE, {}),
    "bert-spans": ("bert", SPANS, ONE, {}),
    "roberta-one": ("roberta", SEQUENCE, ONE, {}),
    "roberta-tokens": ("roberta", TOKENS, ONE, {"type_vocab_size": 2}),
    "roberta-spans": ("roberta", SPANS, ONE, {}),
    "electra-one": ("electra", SEQUENCE, ONE, {}),
    "electra-wide": ("electra", SEQUENCE, SCORES, {"embedding_size": 32}),
    "electra-tokens": ("electra", TOKENS, ONE, {}),
    "electra-spans": ("electra", SPANS, ONE, {}),
    "bert-two-layers": ("bert", SPANS, ONE, {"num_hidden_layers": 2}),
    "llama-one": ("llama", SEQUENCE, ONE, {}),
    "llama-tied": ("llama", SEQUENCE, SCORES, {"tie_word_embeddings": True}),
    "gpt2-some": ("gpt2", SEQUENCE, SOME, {}),
    **{
        f"{name}-one": (name, SEQUENCE, ONE, {})
        for name in ("bloom", "falcon", "gemma", "gemma2", "gpt_neox", "gptj", "mistral", "opt")
    },
    **{f"{name}-one": (name, SEQUENCE, ONE, {}) for name in ("phi3", "qwen2", "qwen3", "stablelm")},
}


def cases(*quick: str) -> Any:
    """All cases; those not named are slow."""
    marks = {True: [], False: [pytest.mark.slow]}
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=marks[c in quick]) for c in CASES]
    )


class Case(NamedTuple):
    """A torch model, the same as a checkpoint, and two examples with labels."""

    hf: Any
    checkpoint: Checkpoint
    batch: TokenBatch
    arguments: dict[str, Any]  # of the torch model


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def checkpoint_of(hf: Any) -> Checkpoint:
    """As `oracle.checkpoint_of`, with the architecture that a saved model has."""
    checkpoint = oracle.checkpoint_of(hf)
    checkpoint.config["architectures"] = [type(hf).__name__]
    return checkpoint


def make_case(case: str) -> Case:
    import torch
    import transformers

    name, task, problem, changes = CASES[case]
    fields = {**models.family(name).TINY, **changes, "num_labels": 3}
    if task == SPANS:
        fields["num_labels"] = 2
    fields |= {"problem_type": problem} if task == SEQUENCE else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    fields.setdefault("pad_token_id", 0)
    config = transformers.AutoConfig.for_model(**fields)
    maker = getattr(transformers, f"AutoModel{TASKS[task].suffix}")
    hf = oracle.randomized(maker.from_config(config, attn_implementation="eager"))
    tokens = 5 + oracle.random_tokens(1, 2, LENGTH, vocab=90)
    types = np.zeros_like(tokens)
    if fields.get("type_vocab_size") == 2:
        types[:, 12:] = 1
    random = np.random.default_rng(0)
    labels, weights = np.zeros((3, 2, LENGTH), np.float32), np.zeros((2, LENGTH), np.float32)
    place = 0 if name in ("bert", "roberta", "electra") else LENGTH - 1
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    given |= {"token_type_ids": types} if types.any() else {}
    if task == TOKENS:
        labels, weights = labels[:1], (random.random((2, LENGTH)) < 0.5).astype(np.float32)
        labels[0] = random.integers(0, 3, (2, LENGTH))
        given["labels"] = np.where(weights > 0, labels[0], -100).astype(np.int64)
    elif task == SPANS:
        labels = labels[:2]
        labels[0, [0, 1], [3, 7]] = labels[1, [0, 1], [9, 7]] = 1
        weights = labels.max(axis=0)
        given |= {"start_positions": np.array([3, 7]), "end_positions": np.array([9, 7])}
    else:
        weights[:, place] = 1
        values = {ONE: np.array([[2], [1]]), SOME: np.array([[1, 0, 1], [0, 0, 1]])}
        values[SCORES] = np.array([[0.5, -1, 2], [1.5, 0, 1]])
        labels = labels[: values[problem].shape[1]]
        labels[:, :, place] = values[problem].T
        given["labels"] = values[problem][:, 0] if problem == ONE else values[problem] * 1.0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    batch = TokenBatch(tokens, positions, np.ones_like(tokens), weights, types, labels)
    arguments = {key: torch.tensor(value) for key, value in given.items()}
    if problem != ONE and task == SEQUENCE:
        arguments["labels"] = arguments["labels"].float()
    return Case(hf, checkpoint_of(hf), batch, arguments)


def loss_and_logits(loaded: Any, objective: str, batch: TokenBatch) -> Any:
    """((loss, logits), gradients) as one program."""

    @jax.jit
    def program(params: Any, batch: TokenBatch) -> Any:
        def loss(params: Any) -> Any:
            model = loaded.skeleton.model(params)
            total, sums = OBJECTIVES[objective](model, batch)
            return total / sums["weight"], label_logits(model, batch)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return program(loaded.params, batch)


@cases("roberta-spans", "electra-tokens", "llama-one")
def test_loss_logits_and_gradients_are_those_of_transformers(case: str):
    hf, checkpoint, batch, arguments = make_case(case)
    loaded, task = oracle.load(checkpoint), CASES[case][1]
    (loss, logits), gradients = loss_and_logits(loaded, task, batch)
    theirs = hf(**arguments)
    theirs.loss.backward()
    assert float(loss) == pytest.approx(theirs.loss.item(), rel=1e-5)
    if task == SPANS:
        expected = np.stack([theirs[key].detach() for key in ("start_logits", "end_logits")], -1)
    else:
        expected = theirs.logits.detach().numpy()
    got = logits if task != SEQUENCE else np.asarray(logits)[batch.weights > 0]
    assert np.abs(expected).max() > 0.1
    assert oracle.difference(got, expected) <= tolerances.LOGITS
    zero = {name: np.zeros(p.shape, np.float32) for name, p in hf.named_parameters()}
    named = zero | {n: p.grad.numpy() for n, p in hf.named_parameters() if p.grad is not None}
    named = oracle.published_names(named, checkpoint.config)
    read = dataclasses.replace(checkpoint, read=lambda tensor: named[tensor])
    abstract = loaded.skeleton.abstract()
    theirs = load_weights(read, loaded.weights, abstract, loaded.stacks)
    scale = max(np.abs(x).max() for x in named.values())
    for path in theirs:
        assert np.abs(gradients[path] - theirs[path]).max() <= tolerances.GRADIENTS * scale, path


@cases("bert-one")
def test_round_trip(case: str, tmp_path: Path):
    _, checkpoint, *_ = make_case(case)
    loaded, folder = oracle.load(checkpoint), tmp_path / "out"
    save_model(folder, loaded.params, checkpoint, loaded.weights, loaded.stacks)
    oracle.assert_same_files(folder, checkpoint)


@cases("bert-two-layers")
def test_laws(case: str):
    _, checkpoint, batch, _ = make_case(case)
    objective, loaded = OBJECTIVES[CASES[case][1]], oracle.load(checkpoint)

    def loss(loaded: Any, params: Any, batch: TokenBatch) -> jax.Array:
        total, sums = objective(loaded.skeleton.model(params), batch)
        return total / sums["weight"]

    def in_one_row(x: Any) -> np.ndarray:
        """Both examples in one row, padded; a second row is empty."""
        row = np.asarray(x).reshape(*x.shape[:-2], 1, 2 * LENGTH)
        return np.pad(row, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 8)])

    gradient = jax.jit(jax.value_and_grad(functools.partial(loss, loaded)))
    expected, gradients = gradient(loaded.params, batch)
    packed = jax.tree.map(in_one_row, batch)
    packed.segment_ids[0, LENGTH : 2 * LENGTH] = 2
    together, packed_gradients = gradient(loaded.params, packed)
    assert float(together) == pytest.approx(float(expected), rel=tolerances.LOGITS)
    scale = max(np.abs(x).max() for x in gradients.values())
    for path, one in gradients.items():
        off = np.abs(packed_gradients[path] - one).max()
        assert off <= tolerances.GRADIENTS * scale, path

    unrolled = oracle.load(checkpoint, layers="unroll")
    found = jax.jit(functools.partial(loss, unrolled))(unrolled.params, batch)
    assert float(found) == pytest.approx(float(expected), rel=tolerances.LOGITS)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2})
    sharded = oracle.load(checkpoint, mesh=mesh)
    placed = rules.placed(sharded.skeleton, mesh)
    params = {path: jax.device_put(x, placed[path].sharding) for path, x in sharded.params.items()}
    spread = jax.jit(functools.partial(loss, sharded))(params, batch)
    assert float(spread) == pytest.approx(float(expected), rel=tolerances.SHARDED)


@pytest.mark.filterwarnings("ignore")  # PEFT warns of Conv1D
@cases("bert-one")
def test_lora_and_head_in_peft(case: str, tmp_path: Path):
    import peft

    hf, checkpoint, batch, arguments = make_case(case)
    task = CASES[case][1]
    loaded = oracle.load(checkpoint)
    targets = ("q_proj", "down_proj") if case == "bert-tokens" else ("all-linear",)
    adapted = oracle.adapt(loaded, Peft(target_modules=targets, rank=3, alpha=5.0))
    params = {**adapted.frozen, **adapted.trainable}
    trained = {
        name for name in params if name.startswith("classifier.") and ".adapter." not in name
    }
    trained -= {name for name in trained if ".pooler." in name}
    assert trained and trained <= adapted.adapters.saved
    random = np.random.default_rng(3)
    params |= {name: random.normal(0, 0.3, params[name].shape).astype("f") for name in trained}
    ours = jax.jit(lambda params: label_logits(adapted.skeleton.model(params), batch))(params)
    base, where = loaded.skeleton.abstract(), (loaded.weights, loaded.stacks)
    save_adapter(
        tmp_path / "adapter",
        params,
        adapted.adapters,
        base,
        *where,
        base="random",
        task_type=TASKS[task].peft,
    )
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == TASKS[task].peft and len(fields["modules_to_save"]) == 1
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "adapter")).eval()
    # PEFT 0.21.2's wrapper for question answering drops token_type_ids.
    found = theirs.base_model(**arguments)
    if task == SPANS:
        expected = np.stack([found[key].detach() for key in ("start_logits", "end_logits")], -1)
    else:
        expected = found.logits.detach().numpy()
    got = ours if task != SEQUENCE else np.asarray(ours)[batch.weights > 0]
    assert oracle.difference(got, expected) <= tolerances.LOGITS
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("adapter", "theirs"):
        back = load_adapter(tmp_path / folder, base, *where, base=checkpoint)
        assert back.adapters.saved == adapted.adapters.saved
        for path, array in back.params.items():
            np.testing.assert_allclose(array, params[path], rtol=1e-6, err_msg=path)


def test_objectives_and_tasks_are_the_same():
    assert tuple(TASKS) == LABELLED


def test_a_new_head_takes_the_place_of_others():
    tiny = open_checkpoint("tiny:llama")
    objective = Objective(name=SEQUENCE, labels=("a", "b", "c"), problem_type=ONE)
    headed = with_head(tiny, objective, seed=1)
    assert headed.config["architectures"] == ["LlamaForSequenceClassification"]
    assert headed.config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    new, gone = (set(x.tensors) - set(y.tensors) for x, y in ((headed, tiny), (tiny, headed)))
    assert new == {"score.weight"} and gone == {"lm_head.weight"}
    assert headed.read("score.weight").shape == (3, 32)
    assert 0.01 < headed.read("score.weight").std() < 0.03
    # The same labels, or none named: the head stays; others: it is new.
    assert with_head(headed, objective, seed=2) is headed
    assert with_head(headed, Objective(name=SEQUENCE), seed=2) is headed
    some = with_head(headed, dataclasses.replace(objective, problem_type=SOME), seed=2)
    assert some.config["problem_type"] == SOME and some.read is headed.read
    other = with_head(headed, dataclasses.replace(objective, labels=("a", "b")), seed=2)
    assert other.tensors["score.weight"].shape == (2, 32)
    assert head_of(other.config) is not None and other.config["label2id"] == {"a": 0, "b": 1}
    bert = with_head(open_checkpoint("tiny:bert"), objective, seed=1)
    assert {"bert.pooler.dense.weight", "classifier.bias"} <= set(bert.tensors)
    assert not bert.read("classifier.bias").any()
    # Another task of that model needs no pooler.
    words = with_head(bert, dataclasses.replace(objective, name=TOKENS), seed=1)
    assert "bert.pooler.dense.weight" not in words.tensors


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ("bert", Objective(), "tiny:bert is an encoder, whose tokens see later ones"),
        ("llama", Objective(name=TOKENS, labels=("a",)), "not supported for llama"),
        ("bert", Objective(name=SEQUENCE), "labels is empty"),
    ],
)
def test_what_no_model_can_do_is_refused(model: str, objective: Objective, message: str):
    with pytest.raises(ConfigError, match=message):
        with_head(open_checkpoint(f"tiny:{model}"), objective, seed=0)


def test_a_head_of_the_same_labels_keeps_its_problem_and_another_is_told_of(
    capsys: pytest.CaptureFixture[str],
):
    stored = Objective(name=SEQUENCE, labels=("a", "b"), problem_type=SCORES)
    headed = with_head(open_checkpoint("tiny:llama"), stored, seed=0)
    for labels in ((), ("a", "b")):
        cfg = RunConfig(objective=Objective(name=SEQUENCE, labels=labels))
        assert with_labels(cfg, headed).objective == stored
    assert not capsys.readouterr().err
    other = dataclasses.replace(stored, labels=("b", "a"))
    assert with_labels(RunConfig(objective=other), headed).objective == other
    assert "of 2 labels, which are not the 2 of" in capsys.readouterr().err


def test_an_exported_classifier_knows_the_tokenizers_padding(tmp_path: Path):
    tiny = open_checkpoint("tiny:llama")
    tiny = dataclasses.replace(tiny, config=tiny.config | {"pad_token_id": None})
    headed = with_head(tiny, Objective(name=SEQUENCE, labels=("a", "b")), seed=0)
    loaded = oracle.load(headed)
    tokenizer = SimpleNamespace(pad_token_id=7, save_pretrained=lambda folder: None)
    where = (loaded.params, headed, loaded.weights, loaded.stacks)
    save_model(tmp_path / "x", *where, tokenizer=tokenizer)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["pad_token_id"] == 7


def test_a_classifier_has_no_next_tokens():
    objective = Objective(name=SEQUENCE, labels=("a", "b"))
    headed = with_head(open_checkpoint("tiny:llama"), objective, seed=0)
    with pytest.raises(ConfigError, match=f"set objective.name={SEQUENCE}"):
        with_head(headed, Objective(), seed=0)


def test_attention_of_another_kind_is_refused():
    fields = models.family("bert").TINY | {"position_embedding_type": "relative_key"}
    with pytest.raises(WeightError, match="position_embedding_type=absolute"):
        models.read_config(fields, "x")
