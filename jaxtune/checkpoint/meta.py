"""What a checkpoint says about itself: data position, metric, and the form of every array.

Orbax casts to another dtype without a word, and its errors about shapes come array by array; so the
forms are kept here and compared with what a run needs before anything is read.
"""

import importlib.metadata
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import WeightError, listing

NAME = "meta.json"
FORMAT_VERSION = 1


class OtherArrays(WeightError):
    """A whole checkpoint, but its arrays are not the ones that were asked for."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The content of `meta.json`.

    Attributes:
        step: the number of finished training steps.
        position: the data position.
        metric: lower is better; None if it was not measured or not finite.
        fingerprint: of the run's configuration.
        arrays: path of each array -> its dtype and shape.
    """

    step: int
    position: dict[str, Any]
    metric: float | None
    fingerprint: str
    arrays: dict[str, str]

    def encode(self) -> bytes:
        """The file's content; TypeError or ValueError if the position is not plain JSON."""
        finite = self.metric is not None and math.isfinite(self.metric)
        content = {
            "format_version": FORMAT_VERSION,
            "jaxtune": _version(),
            **asdict(self),
            "metric": self.metric if finite else None,
        }
        return json.dumps(content, indent=1, allow_nan=False).encode()


def read(step_folder: Path) -> Meta:
    """Reads a step's metadata.

    Raises:
        WeightError: it is of another format.
        ValueError, KeyError, TypeError, OSError: it is damaged.
    """
    content = json.loads((step_folder / NAME).read_bytes())
    version = content.pop("format_version")
    writer = content.pop("jaxtune")
    if version != FORMAT_VERSION:
        raise WeightError(
            f"{step_folder} was written by jaxtune {writer} (format {version}), this is "
            f"{_version()} (format {FORMAT_VERSION}) - use that version to go on"
        )
    return Meta(**content)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path: {"trainable.layers.0.kernel": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the state have the same path"
    return flat


def forms(arrays: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of each array, as in "float32[8, 16]"."""
    return {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays.items()}


def check_same(step_folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises `OtherArrays` unless paths, shapes and dtypes agree."""
    differing = [
        f"{name}: saved {saved.get(name, 'nothing')}, this run {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        raise OtherArrays(
            f"{step_folder} is of another model, adapter or optimizer; {len(differing)} arrays "
            f"differ:{listing(differing, 5)}\n- use the configuration of that run, or another "
            "train.output_dir"
        )


def _version() -> str:
    try:
        return importlib.metadata.version("jaxtune")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
