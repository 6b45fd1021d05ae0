"""Rows of weight tables, and which columns of a fused tensor are whose.

A fused tensor is described by the columns of each of its parts; with them it is split on import and
joined on export. Columns may also only change order: heads whose rotated pairs lie side by side are
stored by us, and rotated, in two halves, which changes no score.
"""

from collections.abc import Mapping

import numpy as np

from jaxtune.models.base import SAME, TRANSPOSE, Change, Weight
from jaxtune.models.decoder import DecoderConfig

Columns = np.ndarray | None


def linear(
    ours: str, hf: str, columns: Columns = None, change: Change = TRANSPOSE
) -> tuple[Weight, ...]:
    """Kernel and bias of a linear layer, or of a part of one."""
    return (
        Weight(f"{ours}.kernel", f"{hf}.weight", change, columns),
        Weight(f"{ours}.bias", f"{hf}.bias", SAME, columns),
    )


def fused(
    parts: Mapping[str, np.ndarray], hf: str, change: Change = TRANSPOSE
) -> tuple[Weight, ...]:
    """Linear layers (our path -> columns) that Hugging Face has as one."""
    return tuple(row for ours in parts for row in linear(ours, hf, parts[ours], change))


def norm(ours: str, hf: str) -> tuple[Weight, ...]:
    """Scale and bias of a norm."""
    return (
        Weight(f"{ours}.scale", f"{hf}.weight", SAME),
        Weight(f"{ours}.bias", f"{hf}.bias", SAME),
    )


def concatenated(*widths: int) -> tuple[np.ndarray, ...]:
    """Columns of parts that follow each other."""
    return tuple(np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1]))


def by_key_head(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[np.ndarray, ...]:
    """Columns of queries, keys and values where each key head follows the queries that see it."""
    group = num_heads // num_kv_heads
    heads = np.arange((num_heads + 2 * num_kv_heads) * head_dim)
    heads = heads.reshape(num_kv_heads, group + 2, head_dim)
    return heads[:, :group].ravel(), heads[:, group].ravel(), heads[:, group + 1].ravel()


def in_halves(columns: np.ndarray, head_dim: int, rotated: int) -> np.ndarray:
    """Columns of heads whose first `rotated` numbers are pairs, first halves of the pairs first."""
    order = np.arange(head_dim)
    order[:rotated] = np.concatenate([order[:rotated:2], order[1:rotated:2]])
    return columns.reshape(-1, head_dim)[:, order].ravel()


def paired_heads(config: DecoderConfig, prefix: str) -> tuple[Weight, ...]:
    """Rows of queries and keys whose rotated numbers are in pairs: `<prefix>q_proj` and k_proj."""
    rope, rows = config.layer_kinds[0].rope, ()
    assert rope is not None
    for name, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        columns = in_halves(np.arange(heads * config.head_dim), config.head_dim, rope.head_dim)
        rows += linear(f"layers.attn.{name}", prefix + name, columns)
    return rows


def qkv(columns: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Columns of queries, keys and values by the paths of their layers."""
    names = (f"layers.attn.{name}_proj" for name in "qkv")
    return dict(zip(names, columns, strict=True))


def gate_up(width: int) -> dict[str, np.ndarray]:
    """Columns of a gate of some width and what it gates, by the paths of their layers."""
    gate, up = concatenated(width, width)
    return {"layers.mlp.gate_proj": gate, "layers.mlp.up_proj": up}
