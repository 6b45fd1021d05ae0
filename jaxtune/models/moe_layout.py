"""What families with experts have in common: names of tensors, and the fields of a router."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models.base import TRANSPOSE, Weight
from jaxtune.models.tables import linear

LAYER = "model.layers.{}."


def experts(
    hf: str, num_experts: int, *, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Weight, ...]:
    """Rows of experts whose files have a tensor for each matrix of each.

    Args:
        hf: name of the mixture, with `{}` for the layer.
        num_experts: E.
        names: what Hugging Face calls gate, up and down.
    """
    ours = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        Weight(
            f"layers.mlp.experts.{mine}.kernel",
            f"{hf}.experts.{{}}.{theirs}.weight",
            TRANSPOSE,
            experts=num_experts,
        )
        for mine, theirs in zip(ours, names, strict=True)
    )


def router(hf: str) -> Weight:
    """The row of a router's matrix."""
    return Weight("layers.mlp.router.weight", f"{hf}.gate.weight", TRANSPOSE)


def shared_expert(hf: str) -> tuple[Weight, ...]:
    """Rows of the MLP that all tokens go through."""
    return tuple(
        row
        for name in ("gate_proj", "up_proj", "down_proj")
        for row in linear(f"layers.mlp.shared_expert.{name}", f"{hf}.{name}")
    )


def num_experts(hf: Mapping[str, Any]) -> int:
    """E, under whichever of its names config.json has it."""
    found = hf.get("num_experts") or hf.get("num_local_experts")
    return found or hf["n_routed_experts"]


def require_all_sparse(hf: Mapping[str, Any]) -> None:
    """Raises WeightError unless every layer has experts."""
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise WeightError(
            "config.json: mlp_only_layers and decoder_sparse_step, by which some layers have no "
            "experts, are not supported - no published model uses them"
        )
