"""Whole runs on rows with labels, and what such runs refuse."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import config, load
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.export import export
from jaxtune.objectives.measures import measures
from jaxtune.schema import (
    LABELLED,
    Checkpoint,
    Data,
    Eval,
    Log,
    Objective,
    Optim,
    Peft,
    RunConfig,
    Train,
)
from jaxtune.train import train
from tests import oracle

SEQUENCE, TOKENS, SPANS = LABELLED
WORDS = "red blue green one two three cat dog owl runs".split()


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def write_rows(path: Path, count: int, seed: int) -> str:
    """Texts that are warm if they begin with red."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = random.choice(WORDS[:4], random.integers(1, 4)).tolist()
        rows.append({"text": " ".join(words), "label": "warm" if words[0] == "red" else "cold"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_config(folder: Path, **changes: Any) -> RunConfig:
    base = RunConfig(
        model=config.resolve({"model": {"path": "tiny:bert"}, "data": {"train": ("x",)}}).model,
        objective=Objective(name=SEQUENCE),
        # tiny:bert has no pooler
        peft=Peft(rank=8, modules_to_save=("pooler",), exclude_modules=("pooler",)),
        data=Data(
            train=(write_rows(folder / "train.jsonl", 160, 0),),
            eval=(write_rows(folder / "eval.jsonl", 40, 1),),
            max_seq_len=32,
            cache="",
        ),
        optim=Optim(learning_rate=2e-2),
        train=Train(
            output_dir=str(folder / "run"), num_steps=6, micro_batch_size=1, compilation_cache=""
        ),
        eval=Eval(batch_size=1, every_steps=3),
        log=Log(progress="off", tensorboard=False, plot=False),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of each other
def test_a_run_and_its_exports(tmp_path: Path):
    import peft
    import torch
    import transformers

    result = train(run_config(tmp_path, checkpoint=Checkpoint(export_merged=True)))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["objective"]
    assert saved["labels"] == ["cold", "warm"]
    assert saved["problem_type"] == "single_label_classification"
    lines = result.paths["metrics"].read_text().splitlines()
    measured = [row for row in map(json.loads, lines) if row["split"] == "eval"]
    assert [row["step"] for row in measured] == [3, 6]
    assert {"loss", "accuracy", "macro_f1"} <= measured[1].keys()
    assert "perplexity" not in measured[1]
    assert measured[1]["loss"] < measured[0]["loss"]

    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    merged = result.paths["merged"]
    maker = transformers.AutoModelForSequenceClassification
    model = maker.from_pretrained(str(merged)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(merged))
    assert model.config.id2label == {0: "cold", 1: "warm"}
    base = maker.from_config(model.config)
    files = open_checkpoint("tiny:bert")
    states = {name: torch.tensor(files.read(name)) for name in files.tensors}
    absent = base.load_state_dict(states, strict=False).missing_keys
    assert {name.split(".")[-2] for name in absent} == {"dense", "classifier"}
    adapted = peft.PeftModel.from_pretrained(base, str(result.paths["adapter"])).eval()
    trained = adapted.base_model.model.classifier.modules_to_save["default"].weight
    np.testing.assert_allclose(trained.detach(), model.classifier.weight.detach(), rtol=1e-6)

    losses, right = [], 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"]).input_ids])
        assert oracle.difference(*(m(ids).logits.detach() for m in (adapted, model))) <= 1e-4
        label = torch.tensor([model.config.label2id[row["label"]]])
        with torch.no_grad():
            found = model(input_ids=ids, labels=label)
        losses.append(found.loss.item())
        right += int(found.logits.argmax() == label)
    assert result.metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.metrics["eval_accuracy"] == pytest.approx(right / len(rows))
    with pytest.raises(ConfigError, match="predicts no next tokens"):
        load(merged)


def test_an_adapter_does_not_leave_a_new_pooler_behind(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"new, and an adapter does not hold it - set peft.modul"):
        train(run_config(tmp_path, peft=Peft(rank=8)))


@pytest.mark.slow
def test_more_steps_of_another_run(tmp_path: Path):
    """An interrupted run goes on with the labels that it found."""
    whole = train(run_config(tmp_path))
    part = Train(output_dir=str(tmp_path / "part"), num_steps=3, compilation_cache="")
    part = dataclasses.replace(part, micro_batch_size=1)
    optim = Optim(learning_rate=2e-2, schedule="constant")
    cfg = run_config(tmp_path, train=part, optim=optim)
    train(cfg)
    again = train(dataclasses.replace(cfg, train=dataclasses.replace(part, num_steps=6)))
    assert again.steps == whole.steps == 6
    exported = export(tmp_path / "part", tmp_path / "exported", to="both")
    assert json.loads((exported["merged"] / "config.json").read_text())["label2id"]["warm"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "objective", "method", "row"),
    [
        ("tiny:llama", Objective(name=SEQUENCE), "lora", {"text": "a b", "label": 0.5}),
        ("tiny:bert", Objective(name=SEQUENCE), "full", {"text": "a b", "label": "x"}),
        ("tiny:electra", Objective(name=TOKENS), "full", {"tokens": ["a"], "tags": ["x"]}),
        ("tiny:roberta", Objective(name=SEQUENCE), "freeze", {"text": "a", "label": ["x", "y"]}),
        (
            "tiny:bert",
            Objective(name=SPANS),
            "lora",
            {
                "question": "q",
                "context": "abc " * 20,
                "answers": {"text": ["b"], "answer_start": [1]},
            },
        ),
    ],
)
def test_runs_of_all_objectives(
    model: str, objective: Objective, method: str, row: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 40)
    cfg = run_config(tmp_path, objective=objective, peft=Peft(method=method))
    data = dataclasses.replace(cfg.data, train=(str(path),), eval=(str(path),))
    if objective.name == SPANS:
        data = dataclasses.replace(data, overlong="split", window_overlap=8)
        finds = dataclasses.replace(cfg.eval, exact_match=True, max_rows=3, max_new_tokens=2)
        cfg = dataclasses.replace(cfg, eval=finds)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=model), data=data)
    result = train(cfg)
    if objective.name == SPANS:
        assert result.metrics["eval_exact_match"] <= result.metrics["eval_f1"] <= 1
        samples = [json.loads(line) for line in result.paths["samples"].read_text().splitlines()]
        assert [sample["reference"] for sample in samples] == ["b"] * 3
        assert all(sample["answer"] in "abc " * 20 for sample in samples)
    assert result.metrics["loss"] < 1 and (result.paths.keys() & {"adapter", "merged"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval": {"exact_match": True}}, "gives no answers"),
        ({"data": {"streaming": True}}, "reads all labels first"),
        ({"data": {"packer": "concat"}}, "looks at whole examples"),
        ({"data": {"overlong": "split"}}, "choose one of truncate_right, drop, error"),
        ({"data": {"template": "chatml"}}, "data.template='chatml' would be ignored"),
        ({"data": {"loss_weights": "examples"}}, "an example has one label"),
        ({"peft": {"method": "prefix"}}, "has no place for the head"),
        ({"train": {"attention_group": 8}}, "attention_group is for objective.name=sft"),
        ({"model": {"loss_dtype": "bfloat16"}}, "has few logits"),
        ({"objective": {"labels": ("a", "a")}}, "a name stands there twice"),
        ({"objective": {"name": "sft", "labels": ("a",)}}, "objective.name=sft has no classes"),
        ({"data": {"window_overlap": 9}}, "window_overlap=9 would be ignored"),
        (
            {"objective": {"name": TOKENS, "problem_type": "regression"}},
            "only sequence_classification has several",
        ),
    ],
)
def test_options_of_answers_are_refused(options: dict[str, Any], message: str):
    tree: dict[str, dict[str, Any]] = {"data": {"train": ("x",)}, "objective": {"name": SEQUENCE}}
    for section, fields in options.items():
        tree[section] = {**tree.get(section, {}), **fields}
    with pytest.raises(ConfigError, match=message):
        config.resolve(tree)


def test_measures():
    right, named, there = [2, 0, 0], [3, 1, 0], [2, 2, 0]
    found = measures(6.0, {"weight": 4.0, "correct": 2.0, "by_label": [right, named, there]})
    assert found == {"loss": 1.5, "accuracy": 0.5, "macro_f1": pytest.approx((4 / 5 + 0) / 2)}
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 50)) + 3
    sums = {"weight": 50.0, "moments": np.array([x, y, x * x, y * y, x * y]).sum(1)[:, None]}
    assert measures(1.0, sums)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
