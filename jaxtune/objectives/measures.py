"""What the sums of an objective over held-out rows say."""

from collections.abc import Mapping

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


def _pearson(means: np.ndarray) -> float:
    """Correlation, of means [5, K] of x, y, x^2, y^2 and x y; the mean over K."""
    x, y, xx, yy, xy = means
    spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    safe = np.where(spread > 0, spread, 1)
    return float(np.where(spread > 0, (xy - x * y) / safe, 0).mean())
