"""Parameters as flat dictionaries: `{"layers.0.attn.q_proj.kernel": array, ...}`.

A model is described once (`describe`) and split into a `Skeleton`, which holds no arrays, and flat
dictionaries, which hold nothing else. Outside a model's own methods everything (gradients,
optimizer state, checkpoints, exports) works on such dictionaries; `Skeleton.model` makes a model of
them again.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

Params = dict[str, Any]


def path_name(path: tuple) -> str:
    """("layers", 0, "attn") -> "layers.0.attn"."""
    return ".".join(map(str, path))


def flatten(model: nnx.Module) -> Params:
    """The model's variables by dotted path, values as they are."""
    return {
        path_name(path): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays.

    Attributes:
        graphdef: the structure of the module.
        variables: dotted path -> (path, abstract variable with its metadata).
    """

    graphdef: nnx.GraphDef
    variables: Mapping[str, tuple[tuple, nnx.Variable]]

    def model(self, params: Mapping[str, Any]) -> Any:
        """A model that holds `params`, one array for every variable of the skeleton."""
        state = nnx.from_flat_state(
            [
                (path, variable.replace(params[name]))
                for name, (path, variable) in self.variables.items()
            ]
        )
        return nnx.merge(self.graphdef, state)

    def select(self, kind: type[nnx.Variable]) -> set[str]:
        """Names of the variables of one type."""
        return {
            name for name, (_, variable) in self.variables.items() if isinstance(variable, kind)
        }

    def axes(self, name: str) -> tuple[str | None, ...]:
        """Logical names of the trailing axes of a parameter; () if it has none."""
        return self.variables[name][1].get_metadata().get("axes", ())

    def abstract(self) -> Params:
        """Shape and dtype of every variable."""
        return {name: variable.get_value() for name, (_, variable) in self.variables.items()}


def describe(build: Callable[[], nnx.Module]) -> Skeleton:
    """Runs a model's constructor on shapes only; no array is made."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat = nnx.to_flat_state(state)
    return Skeleton(graphdef, {path_name(path): (path, variable) for path, variable in flat})


def count(params: Mapping[str, Any]) -> int:
    """Number of elements; a quantized kernel counts as the kernel that it stands for."""
    return sum(int(np.prod(leaf.shape)) for leaf in params.values())


def matches(pattern: str, name: str) -> bool:
    """Whether a target names a module: its last part, its last parts, or a regular expression.

    The rules are PEFT 0.21's for lists (`name` or `*.name`) and for strings (`re.fullmatch`).
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
