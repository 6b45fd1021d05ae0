"""Adapters of experts as PEFT's `target_parameters`: of one parameter with all experts of a layer.

With A [E, D, R] and B [E, R, F] PEFT 0.21.2 (tuners/lora/layer.py, `ParamWrapper`) stores

    lora_A.weight [E R, D], expert by expert      lora_B.weight [F, R E], rank by rank

under the name of the mixture's experts. If two of its parameters are adapted, the wrapper of the
second is around that of the first, whose name gets one more `base_layer`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.checkpoint.hf import split_path
from jaxtune.models.base import SAME, Change, Weight
from jaxtune.peft.base import Tensor

_FIRST, _SECOND = "gate_up_proj", "down_proj"


def tensors(rank: int, experts: int, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a parameter of experts with LoRA."""
    a = Change(
        lambda array: array.reshape(experts, rank, d_in).transpose(0, 2, 1),
        lambda array: array.transpose(0, 2, 1).reshape(experts * rank, d_in),
    )
    b = Change(
        lambda array: array.reshape(d_out, rank, experts).transpose(2, 1, 0),
        lambda array: array.transpose(2, 1, 0).reshape(d_out, rank * experts),
    )
    return {
        "a": Tensor("lora_A.weight", (experts, d_in, rank), a, ("expert", "in", "rank")),
        "b": Tensor(
            "lora_B.weight", (experts, rank, d_out), b, ("expert", "rank", "out"), scaled=True
        ),
    }


def wrapper(name: str, adapted: Collection[str]) -> str:
    """Where the adapter of a parameter is in PEFT's model.

    Args:
        name: of the parameter in the transformers model.
        adapted: names of all that are adapted.
    """
    experts, _, parameter = name.rpartition(".")
    is_inside = parameter == _FIRST and f"{experts}.{_SECOND}" in adapted
    return f"{experts}.base_layer" if is_inside else experts


def as_parameters(weights: Sequence[Weight], base_params: Mapping[str, Any]) -> tuple[Weight, ...]:
    """A weight table whose experts are the parameters of transformers 5.

    Args:
        weights: the table; of experts that have a tensor each, rows are exchanged.
        base_params: path -> anything with `.shape`, of the base model.
    """
    shapes = {split_path(path)[1]: leaf.shape for path, leaf in base_params.items()}
    return tuple(
        _as_parameter(row, shapes[row.ours][-1]) if row.experts else row for row in weights
    )


def _as_parameter(row: Weight, width: int) -> Weight:
    mixture = row.hf.partition(".experts.")[0].replace(".block_sparse_moe", ".mlp")
    leaf = row.ours.split(".")[-2]
    if leaf == _SECOND:
        return Weight(row.ours, f"{mixture}.experts.{_SECOND}", SAME)
    columns = np.arange(width) + (width if leaf == "up_proj" else 0)
    return Weight(row.ours, f"{mixture}.experts.{_FIRST}", SAME, columns)
