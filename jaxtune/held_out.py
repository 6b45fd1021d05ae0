"""Measurements on held-out rows during a run: loss, accuracy and the like, exact match, F1."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import data, process
from jaxtune.build import Run
from jaxtune.data.examples import Extractive
from jaxtune.infer import Sampling, generate, stop_ids
from jaxtune.infer.spans import find_answers
from jaxtune.log import Log, read_rows, warn
from jaxtune.models.heads import label_logits
from jaxtune.objectives.measures import measures, squad
from jaxtune.sharding.rules import batch_shards
from jaxtune.step import make_eval_step
from jaxtune.tree import Params

SHOWN = 3  # sample answers printed at the end


class HeldOut:
    """Measures the held-out set of a run, if it has one.

    Attributes:
        last: newest value of every measurement, named "eval_<name>".
    """

    def __init__(
        self, run: Run, tokenizer: Any, dataset: data.Dataset | None, frozen: Params, log: Log
    ):
        self.last: dict[str, float] = {}
        self._run, self._tokenizer, self._dataset = run, tokenizer, dataset
        self._frozen, self._log = frozen, log
        self._eval_step = make_eval_step(run.skeleton, run.objective)
        self._measured_at = -1

    def loss_at(self, step: int) -> float | None:
        """The held-out loss, by which the best checkpoint is chosen, if it was measured now."""
        return self.last["eval_loss"] if self._measured_at == step else None

    def measure(self, step: int, trainable: Params) -> None:
        """Loss and what else the objective measures (`objectives.measures`), of all rows."""
        if self._dataset is None:
            return
        batches = self._batches(self._dataset)
        found = [jax.device_get(self._eval_step(trainable, self._frozen, b)) for b in batches]
        loss, sums = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *found)
        row = measures(float(loss), sums)
        if not self._run.config.objective.is_labelled:
            row["perplexity"] = math.exp(min(row["loss"], 700.0))
        self._measured_at = step
        self._record(step, row)

    def _batches(self, dataset: data.Dataset) -> Iterator[data.Batch]:
        config = self._run.config
        rows = config.eval.batch_size * batch_shards(self._run.mesh)
        held = self._run.held_rows(rows)
        loader = data.Loader(dataset, config.data, rows, 1, config.train.seed, held)
        return (self._run.put(batch, rows) for batch in loader.one_pass())

    def answer(self, step: int, trainable: Params) -> dict[str, Path]:
        """Generates the last answer of each held-out row, or finds it, and counts the exact ones.

        Returns:
            {"samples": file with all answers}, or {} if the config does not ask for it.
        """
        config = self._run.config.eval
        if not config.exact_match or self._dataset is None:
            return {}
        self._log.say(f"answering {len(self._rows())} held-out rows ...")
        finds = self._run.config.objective.has_spans
        answers, row = (self._found if finds else self._generated)(trainable)
        self._record(step, row)
        return self._write_samples("answer" if step else "answer_before", answers)

    def _generated(self, trainable: Params) -> tuple[list[str], dict[str, float]]:
        """The answers of a language model, and how many are exact."""
        rows, config = self._rows(), self._run.config.eval
        prompts = [self._prompt_ids(row) for row in rows]
        outputs = generate(
            self._run.skeleton,
            {**self._frozen, **trainable},
            prompts,
            max_new_tokens=config.max_new_tokens,
            eos_ids=stop_ids(self._run.checkpoint, self._tokenizer),
            sampling=Sampling(),
        )
        answers = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
        exact = [
            answer.strip() == row.messages[-1].content.strip()
            for answer, row in zip(answers, rows, strict=True)
        ]
        return answers, {"exact_match": sum(exact) / len(exact)}

    def _prompt_ids(self, row: data.Example) -> list[int]:
        """What stands before the last answer, as the model reads it."""
        config, before = self._run.config, row.messages[:-1]
        if config.objective.is_paired:
            return data.source_ids(self._tokenizer, before, config.data.max_seq_len)
        return data.prompt_ids(self._tokenizer, before, tools=row.tools, raw=row.raw).tolist()

    def _found(self, trainable: Params) -> tuple[list[str], dict[str, float]]:
        """The parts of contexts that answer questions, and SQuAD's measures of them."""
        run, rows = self._run, self._rows()
        batch_rows = run.config.eval.batch_size * batch_shards(run.mesh)
        held = list(run.held_rows(batch_rows))

        def score(batch: data.TokenBatch) -> np.ndarray:
            own = run.put(jax.tree.map(lambda x: x[held], batch), batch_rows)
            return jax.device_get(self._span_scores(trainable, self._frozen, own))

        answers = find_answers(
            rows,
            self._tokenizer,
            score,
            rows=batch_rows,
            length=run.config.data.max_seq_len,
            overlap=run.config.data.window_overlap,
            longest=run.config.eval.max_new_tokens,
        )
        right = [(row.answer, *row.others) for row in rows]
        return answers, squad(answers, right)

    @functools.cached_property
    def _span_scores(self) -> Any:
        """(trainable, frozen, batch) -> float32 [B, T, 2] on every device, compiled."""

        def scores(trainable: Params, frozen: Params, batch: data.TokenBatch) -> jax.Array:
            return label_logits(self._run.skeleton.model({**frozen, **trainable}), batch)

        return jax.jit(scores, out_shardings=NamedSharding(self._run.mesh, PartitionSpec()))

    def _rows(self) -> list[Any]:
        """The conversations whose last answer is measured, or questions with their contexts."""
        assert self._dataset is not None
        return self._dataset.examples[: self._run.config.eval.max_rows or None]

    def _write_samples(self, field: str, answers: list[str]) -> dict[str, Path]:
        """Adds a field to the rows of samples.jsonl; after training, shows a few rows."""
        path = Path(self._run.config.train.output_dir) / "samples.jsonl"
        if not process.is_first():
            return {"samples": path}
        samples = [
            {"prompt": _prompt(row), "reference": _reference(row), field: answer}
            for row, answer in zip(self._rows(), answers, strict=True)
        ]
        if field == "answer" and path.exists():
            before = read_rows(path)
            if [row["prompt"] for row in before] == [row["prompt"] for row in samples]:
                samples = [
                    row | {"answer_before": old.get("answer_before")}
                    for row, old in zip(samples, before, strict=True)
                ]
        try:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            warn(f"samples.jsonl cannot be written ({error})")
            return {}
        for row in samples[:SHOWN] if field == "answer" else []:
            self._log.say("\n".join(f"  {name}: {text}" for name, text in row.items()))
        return {"samples": path}

    def _record(self, step: int, row: dict[str, float]) -> None:
        self.last |= {f"eval_{name}": value for name, value in row.items()}
        self._log.write(step, "eval", row)


def _reference(row: data.Example | Extractive) -> str:
    return row.answer if isinstance(row, Extractive) else row.messages[-1].content


def _prompt(row: data.Example | Extractive) -> str:
    """What stands before the last answer (nothing, if the row is a text)."""
    if isinstance(row, Extractive):
        return row.question
    return row.messages[-2].content if len(row.messages) > 1 else ""
