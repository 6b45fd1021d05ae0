"""Answers found in contexts, against run_qa of transformers' examples and SQuAD's script."""

import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest

from jaxtune.data import TokenBatch
from jaxtune.data.examples import Extractive
from jaxtune.infer.spans import find_answers
from jaxtune.objectives.measures import squad

WORDS = [f"w{i}" for i in range(40)]
LENGTH, OVERLAP, LONGEST = 16, 4, 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")


def questions(answered: bool) -> list[Extractive]:
    random = np.random.default_rng(0)
    found = []
    for i in range(6):
        question, context = (
            "  ".join(random.choice(WORDS, n)) for n in (i % 3 + 1, random.integers(3, 40))
        )
        start = -1 if i == 2 and not answered else 0
        found.append(Extractive(question, context, context.split()[0] * (start == 0), start))
    return found


def scores_of(tokens: np.ndarray) -> np.ndarray:
    """Some scores of a window's tokens that depend on all of them: [T, 2]."""
    return np.random.default_rng(tokens.tolist()).normal(size=(len(tokens), 2)).astype(np.float32)


def transcribed(rows: list[Extractive], tokenizer: Any, negative: bool) -> list[str]:
    """`postprocess_qa_predictions` of run_qa.py, with all tokens as candidates."""
    answers = []
    for row in rows:
        features = tokenizer(
            row.question,
            row.context,
            truncation="only_second",
            max_length=LENGTH,
            stride=OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        least, candidates = np.inf, []
        for i, ids in enumerate(features["input_ids"]):
            start, end = scores_of(np.array(ids)).T
            least = min(least, start[0] + end[0])
            inside = [n for n, part in enumerate(features.sequence_ids(i)) if part == 1]
            for first in inside:
                for last in inside:
                    if last < first or last - first + 1 > LONGEST:
                        continue
                    offsets = features["offset_mapping"][i]
                    text = row.context[offsets[first][0] : offsets[last][1]]
                    candidates.append((start[first] + end[last], text))
        value, text = max(candidates)
        answers.append("" if negative and least > value else text)
    return answers


@pytest.mark.parametrize("answered", [True, False])
def test_answers_are_those_of_run_qa(tokenizer: Any, answered: bool):
    rows, sizes = questions(answered), []

    def score(batch: TokenBatch) -> np.ndarray:
        assert batch.tokens.shape == (4, LENGTH)
        found = np.full((*batch.tokens.shape, 2), np.nan, np.float32)
        for row, (tokens, segments) in enumerate(zip(batch.tokens, batch.segment_ids, strict=True)):
            sizes.append(int(segments.sum()))
            found[row, : sizes[-1]] = scores_of(np.asarray(tokens)[: sizes[-1]].astype(int))
        return found

    how = {"rows": 4, "length": LENGTH, "overlap": OVERLAP, "longest": LONGEST}
    got = find_answers(rows, tokenizer, score, **how)
    assert got == transcribed(rows, tokenizer, negative=not answered)
    assert np.count_nonzero(sizes) > len(rows)  # windows, and some questions have several


def theirs(answer: str, right: str) -> tuple[float, float]:
    """Exact match and F1 of SQuAD 2.0's evaluation script."""

    def normalized(text: str) -> str:
        lower = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", lower).split())

    got, wanted = normalized(answer).split(), normalized(right).split()
    exact = float(normalized(answer) == normalized(right))
    same = sum((Counter(wanted) & Counter(got)).values())
    if not got or not wanted:
        return exact, float(got == wanted)
    if not same:
        return exact, 0.0
    precision, recall = same / len(got), same / len(wanted)
    return exact, 2 * precision * recall / (precision + recall)


def test_measures_are_those_of_squad():
    pairs = [
        ("The  Eiffel-Tower.", ("eiffeltower", "a tower")),
        ("in Paris, France", ("Paris", "paris france")),
        ("", ("",)),
        ("an", ("",)),
        ("Rome", ("",)),
        ("", ("Rome",)),
        ("red red blue", ("red blue blue", "green")),
    ]
    expected = [np.max([theirs(got, one) for one in right], axis=0) for got, right in pairs]
    answers, right = zip(*pairs, strict=True)
    found = squad(answers, right)
    assert [found["exact_match"], found["f1"]] == pytest.approx(np.mean(expected, axis=0))
