"""How far merged weights, as they are stored, are from base and change added in float32."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Roundings:
    """Errors of merged tensors, by their names in Hugging Face's files.

    Attributes:
        weights: norm (Frobenius) of each merged tensor, in float32.
        changes: norm of what the adapter added to it.
        errors: norm of what the stored tensor differs from it by.
        exact: the last merged tensor, for `stored`.
    """

    weights: dict[str, float] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    exact: np.ndarray | None = None

    def merged(self, name: str, array: np.ndarray, base: np.ndarray) -> None:
        """Notes a merged tensor, float32, and what it was before; unless nothing was added."""
        change = float(np.linalg.norm(array - base))
        if change:
            self.weights[name], self.changes[name] = float(np.linalg.norm(array)), change
            self.exact = array

    def stored(self, name: str, array: np.ndarray) -> None:
        """Notes what is stored of the tensor that was merged last, in any dtype or decoded."""
        if name in self.weights:
            assert self.exact is not None
            self.errors[name] = float(np.linalg.norm(array.astype(np.float32) - self.exact))

    def summary(self) -> dict[str, Any]:
        """For the record of an export: errors as parts of the weight and of the change."""
        return {
            "tensors": len(self.errors),
            "relative_error": _relative(self.errors, self.weights),
            "share_of_change": _relative(self.errors, self.changes),
        }

    def __str__(self) -> str:
        weight, change = (_relative(self.errors, of) for of in (self.weights, self.changes))
        return (
            f"merged {len(self.errors)} tensors; as they are stored they are {weight['mean']:.1e} "
            f"off on average, at worst {weight['worst']:.1e} ({weight['tensor']}); that is "
            f"{change['mean']:.1e} of the change, at worst {change['worst']:.1e}"
        )


def _relative(errors: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, Any]:
    """Mean and worst quotient, and the tensor that has the worst."""
    found = {name: error / norms[name] for name, error in errors.items()}
    worst = max(found, key=lambda name: found[name])
    return {"mean": sum(found.values()) / len(found), "worst": found[worst], "tensor": worst}
