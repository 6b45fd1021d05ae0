"""What the sums of an objective over held-out rows say."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def measures(loss: float, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Measurements by name.

    `loss` is the mean, `accuracy` the share of correct weight. `macro_f1` is the mean of the F1
    scores of all classes that occur or are named; `pearson` that of the correlations of all outputs
    with their targets (0 where one of the two is constant).

    Args:
        loss: its sum.
        sums: what the objective reports.
    """
    weight = max(float(sums["weight"]), 1e-8)
    found = {"loss": loss / weight}
    if "correct" in sums:
        found["accuracy"] = float(sums["correct"]) / weight
    if "by_label" in sums:
        right, named, there = np.asarray(sums["by_label"], np.float64)
        occurs = named + there > 0
        found["macro_f1"] = float((2 * right[occurs] / (named + there)[occurs]).mean())
    if "moments" in sums:
        found["pearson"] = _pearson(np.asarray(sums["moments"], np.float64) / weight)
    return found


def squad(answers: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's measures (Rajpurkar et al. 2016, arXiv 1606.05250, 6.1; 1.1's evaluation script).

    Texts are compared in lower case, without punctuation, articles and double spaces; of several
    right answers the best counts. F1 is that of their words; of an answer that is empty, or should
    be, 1 if both are.

    Args:
        answers: one to each question.
        right: the right ones of each.

    Returns:
        `exact_match` and `f1`, means from 0 to 1.
    """
    exact, overlap = [], []
    for answer, others in zip(answers, right, strict=True):
        words, wanted = _words(answer), [_words(other) for other in others]
        exact.append(any(words == other for other in wanted))
        overlap.append(max(_f1(words, other) for other in wanted))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def _pearson(means: np.ndarray) -> float:
    """Correlation, of means [5, K] of x, y, x^2, y^2 and x y; the mean over K."""
    x, y, xx, yy, xy = means
    spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    safe = np.where(spread > 0, spread, 1)
    return float(np.where(spread > 0, (xy - x * y) / safe, 0).mean())
