"""Answers that a model with a head for spans finds in contexts.

A context is read in windows; of all windows the span with the largest sum of its first token's
score as start and its last token's as end is the answer (Devlin et al. 2018, arXiv 1810.04805,
4.2). That none is there scores as the first token of a window does, in the window where this is
least, as in transformers' run_qa.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data import Labelling, TokenBatch
from jaxtune.data.examples import Extractive
from jaxtune.data.label_rows import backend_of
from jaxtune.data.windows import windows

_SPANS = Labelling("question_answering", ("start", "end"))


class _Window(NamedTuple):
    owner: int  # number of its question
    encoding: Any
    kept: np.ndarray


def find_answers(
    questions: Sequence[Extractive],
    tokenizer: Any,
    score: Callable[[TokenBatch], np.ndarray],
    *,
    rows: int,
    length: int,
    overlap: int,
    longest: int,
) -> list[str]:
    """The part of each context that answers its question; "" if none does.

    Answers are empty only if one of the questions has none, or no window fits the length.

    Args:
        questions: with their contexts.
        tokenizer: of transformers, with offsets.
        score: a batch of windows -> float32 [B, T, 2], each token as start and as end.
        rows: B.
        length: T.
        overlap: tokens of the context that a window has of the one before.
        longest: most tokens of an answer.
    """
    backend = backend_of(tokenizer, _SPANS)
    encodings = backend.encode_batch([(q.question, q.context) for q in questions])
    made = [
        _Window(owner, encoding, kept)
        for owner, encoding in enumerate(encodings)
        for kept in windows(encoding, length, overlap)
    ]
    best = [(-np.inf, "")] * len(questions)
    nothing = [np.inf] * len(questions)
    for first in range(0, len(made), rows):
        part = made[first : first + rows]
        for window, scores in zip(part, score(_batch(part, rows, length)), strict=False):
            owner = window.owner
            found = _best(window, scores[: len(window.kept)], longest, questions[owner].context)
            best[owner] = max(best[owner], found, key=lambda pair: pair[0])
            nothing[owner] = min(nothing[owner], scores[0].sum())
    may_be_empty = any(question.start < 0 for question in questions)
    return [
        "" if may_be_empty and none > value else text
        for (value, text), none in zip(best, nothing, strict=True)
    ]


def _batch(part: Sequence[_Window], rows: int, length: int) -> TokenBatch:
    """Windows as rows of a batch, the rest padding."""
    tokens, positions, segments, types = np.zeros((4, rows, length), np.int32)
    for row, (_, encoding, kept) in enumerate(part):
        size = len(kept)
        tokens[row, :size] = np.array(encoding.ids)[kept]
        types[row, :size] = np.array(encoding.type_ids)[kept]
        positions[row, :size], segments[row, :size] = np.arange(size), 1
    return TokenBatch(tokens, positions, segments, np.zeros((rows, length), np.float32), types)


def _best(window: _Window, scores: np.ndarray, longest: int, context: str) -> tuple[float, str]:
    """The score and text of the best span in the window's part of the context."""
    _, encoding, kept = window
    belongs = encoding.sequence_ids  # a new list each time that it is asked for
    inside = np.flatnonzero([belongs[token] == 1 for token in kept])
    if not len(inside):
        return -np.inf, ""
    starts, ends = scores[inside].T
    sums = starts[:, None] + ends[None, :]
    size = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    sums = np.where((size >= 0) & (size < longest), sums, -np.inf)
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    begin, end = (encoding.offsets[kept[inside[place]]] for place in (first, last))
    return float(sums[first, last]), context[begin[0] : end[1]]
