"""Adapters of layers that Hugging Face keeps as one, or whose outputs it keeps in another order.

LoRA of n parts is LoRA of the whole. With A_p [D, R] and B_p [R, O_p] of part p the whole has

    A [D, n R] = [A_1 ... A_n]      B [n R, O]: B_p in rows p R to (p + 1) R, in the part's columns

with zeros elsewhere, and the biases of B in the parts' columns; a part without adapter leaves its
block zero. The other way round every part has the A of the whole and its columns of B, and where B
is of that form only its own block.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.checkpoint.adapter_config import Module, is_matrix
from jaxtune.checkpoint.hf import split_path
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.peft import Adapters, weight_name
from jaxtune.peft.lora import Config, with_rank

METHOD = "lora"
Arrays = Mapping[str, np.ndarray]


class Whole(NamedTuple):
    """An adapted layer of the transformers model.

    Attributes:
        name: its path there.
        config: knobs of its adapter.
        parts: our layers, in the order of the weight table; None: not adapted.
        columns: of each part; () if there is one and it is the same there.
    """

    name: str
    config: Any
    parts: tuple[Module | None, ...]
    columns: tuple[np.ndarray, ...]

    @property
    def first(self) -> Module:
        """The first adapted part."""
        return next(part for part in self.parts if part is not None)


def require_supported(adapters: Adapters, weights: Sequence[Weight]) -> None:
    """Raises ConfigError for adapters of fused layers that no PEFT folder of ours can hold."""
    rows = {row.ours: row for row in weights}
    for path in adapters.choice:
        if ".experts." in path and not rows[f"{split_path(path)[1]}.kernel"].experts:
            raise ConfigError(
                f"config.peft: {path} is one tensor of all experts in this family's files, which "
                "no adapter of ours can name - take it out with peft.exclude_modules=.*experts.*"
            )
    for path in adapters.choice if adapters.method != METHOD else ():
        if rows[weight_name(split_path(path)[1])].columns is not None:
            raise ConfigError(
                f"config.peft.method={adapters.method}: {path} is part of a tensor, or in another "
                f"order, in this family's files - use {METHOD}, or other peft.target_modules"
            )


def wholes(adapted: Sequence[Module], weights: Sequence[Weight]) -> list[Whole]:
    """The layers of the transformers model that the adapted ones are, with the knobs of a part."""
    rows = {row.ours.rpartition(".")[0]: row for row in weights if is_matrix(row)}
    found: dict[str, dict[str, Module]] = {}
    for module in adapted:
        found.setdefault(module.name, {})[split_path(module.path)[1]] = module
    result = []
    for name, modules in found.items():
        path, first = next(iter(modules.items()))
        names = [ours for ours, row in rows.items() if row.hf == rows[path].hf]
        columns = tuple(c for ours in names if (c := rows[ours].columns) is not None)
        result.append(Whole(name, first.config, tuple(map(modules.get, names)), columns))
    return result


def with_room(whole: Whole) -> Whole:
    """The whole with the rank that its parts need together, and a part's scale."""
    if not whole.columns:
        return whole
    rank = max(part.config.rank for part in whole.parts if part is not None)
    return whole._replace(config=with_rank(whole.config, len(whole.parts) * rank))


def leaves(config: Config) -> tuple[str, ...]:
    """The variables of a part that are those of the whole."""
    return ("a", "b", "bias") if config.lora_bias else ("a", "b")


def joined(whole: Whole, arrays: Sequence[Arrays | None]) -> Arrays:
    """The variables of a whole `with_room`, from those of its parts (None: not adapted)."""
    if not whole.columns:
        (only,) = arrays
        assert only is not None
        return only
    own = whole.config.rank // len(whole.parts)
    width = next(part["a"].shape[0] for part in arrays if part is not None)
    a = np.zeros((width, whole.config.rank), np.float32)
    b = np.zeros((whole.config.rank, sum(map(len, whole.columns))), np.float32)
    bias = np.zeros(b.shape[1], np.float32)
    for i, (module, part) in enumerate(zip(whole.parts, arrays, strict=True)):
        if module is not None and part is not None:
            rank = module.config.rank
            rows = slice(i * own, i * own + rank)
            a[:, rows] = part["a"][:, :rank]
            scale = module.config.scale / whole.config.scale
            b[rows, whole.columns[i]] = part["b"][:rank] * scale
            if "bias" in part:
                bias[whole.columns[i]] = part["bias"] * scale
    return {"a": a, "b": b, "bias": bias}


def separated(whole: Whole, arrays: Arrays) -> Iterator[tuple[Module, Any, Arrays]]:
    """Each part of a whole that was read, all of them adapted, with its knobs and variables."""
    if not whole.columns:
        yield whole.first, whole.config, arrays
        return
    a, b, rank, count = arrays["a"], arrays["b"], whole.config.rank, len(whole.parts)
    own = rank // count
    blocks = np.zeros(b.shape, np.bool_)
    for i, columns in enumerate(whole.columns):
        blocks[i * own : (i + 1) * own, columns] = True
    is_joined = rank % count == 0 and not b[~blocks].any()
    for i, (module, columns) in enumerate(zip(whole.parts, whole.columns, strict=True)):
        assert module is not None
        rows = slice(i * own, (i + 1) * own) if is_joined else slice(None)
        config = with_rank(whole.config, own) if is_joined else whole.config
        bias = {"bias": arrays["bias"][columns]} if whole.config.lora_bias else {}
        yield module, config, {"a": a[:, rows], "b": b[rows, columns], **bias}
