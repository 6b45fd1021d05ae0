"""Adapters of layers that Hugging Face keeps as one, or whose outputs it keeps in another order.

LoRA of n parts is LoRA of the whole. With A_p [D, R] and B_p [R, O_p] of part p the whole has

    A [D, n R] = [A_1 ... A_n]      B [n R, O]: B_p in rows p R to (p + 1) R, in the part's columns

with zeros elsewhere. So it is for whatever lies along inputs, ranks and outputs (`Tensor.axes`):
LoHa's two pairs, as a block of one product meets zeros of the other outside of itself; the mixer of
MoSLoRA; and what is one number for each output, DoRA's magnitudes and the factors of (IA)3. The
other way round every part has what lies along inputs and ranks of the whole, and its outputs; of
blocks only its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.checkpoint import expert_parameters
from jaxtune.checkpoint.adapter_config import Module, is_matrix, modules
from jaxtune.checkpoint.hf import split_path
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.peft import METHODS, Adapters, module_of, weight_name
from jaxtune.peft.base import Tensor
from jaxtune.peft.lora import with_rank

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


def require_supported(
    adapters: Adapters,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
) -> None:
    """Raises ConfigError for adapters of fused layers that no folder of ours can hold.

    Args:
        adapters: what is attached.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.
    """
    for whole in wholes(adapters, weights, stacks):
        found: list[Tensor] = []
        for part in whole.parts if whole.columns[1:] else ():
            own = whole._replace(config=part.config) if part is not None else whole
            found += tensors_of(adapters, own, base_params).values()
        problem = ""
        if any(not {"rank", "out"} & set(tensor.axes) for tensor in found):
            problem = "all parts have one input - take them out of peft.feedforward_modules"
        if any(tensor.absent is None for tensor in found) and None in whole.parts:
            problem = "no part can be without adapter - target all of them, or none"
        if problem:
            raise ConfigError(
                f"config.peft.method={adapters.method}: {whole.first.path} is part of {whole.name} "
                f"in this family's files, of which {problem}"
            )


def wholes(adapters: Adapters, weights: Sequence[Weight], stacks: Sequence[int]) -> list[Whole]:
    """The layers of the transformers model that the adapted ones are, with the knobs of a part."""
    rows = {row.ours.rpartition(".")[0]: row for row in weights if is_matrix(row)}
    found: dict[str, dict[str, Module]] = {}
    for module in modules(weights, adapters, stacks):
        found.setdefault(module.name, {})[split_path(module.path)[1]] = module
    result = []
    for name, parts in found.items():
        path, first = next(iter(parts.items()))
        if hasattr(METHODS[adapters.method], "APART"):
            result.append(Whole(name, first.config, (first,), ()))
            continue
        names = [ours for ours, row in rows.items() if row.hf == rows[path].hf]
        columns = tuple(c for ours in names if (c := rows[ours].columns) is not None)
        result.append(Whole(name, first.config, tuple(map(parts.get, names)), columns))
    return result


def tensors_of(
    adapters: Adapters, whole: Whole, base_params: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the adapter of a whole is made of."""
    path = whole.first.path
    *stack, d_in, d_out = base_params[weight_name(path)].shape
    d_out = sum(map(len, whole.columns)) or d_out
    if whole.first.is_parameter:
        return expert_parameters.tensors(whole.config.rank, stack[-1], d_in, d_out)
    return module_of(adapters, path).tensors(whole.config, d_in, d_out)


def with_room(whole: Whole) -> Whole:
    """The whole with the rank that its parts need together, and a part's scale."""
    rank = max(_rank(part.config) for part in whole.parts if part is not None)
    if not whole.columns or not rank:
        return whole
    return whole._replace(config=with_rank(whole.config, len(whole.parts) * rank))


def joined(whole: Whole, tensor: Tensor, arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """A variable of a whole `with_room`, from those of its parts (None: not adapted)."""
    if not whole.columns:
        (only,) = arrays
        assert only is not None
        return only
    own = _rank(whole.config) // len(whole.parts)
    result = np.full(tensor.shape, tensor.absent or 0.0, np.float32)
    for i, (module, array) in enumerate(zip(whole.parts, arrays, strict=True)):
        if module is not None and array is not None:
            block = _block(whole, tensor, i, i * own, _rank(module.config))
            part = array[tuple(slice(index.size) for index in block)]
            result[block] = part * (
                module.config.scale / whole.config.scale if tensor.scaled else 1
            )
    return result


def separated(
    whole: Whole, tensors: Mapping[str, Tensor], arrays: Arrays
) -> Iterator[tuple[Module, Any, Arrays]]:
    """Each part of a whole that was read, all of them adapted, with its knobs and variables.

    Args:
        whole: the layer.
        tensors: what its adapter is made of.
        arrays: their values.
    """
    if not whole.columns:
        yield whole.first, whole.config, arrays
        return
    rank, count = _rank(whole.config), len(whole.parts)
    in_blocks = rank % count == 0 and all(
        _is_in_blocks(whole, tensor, arrays[leaf], rank // count)
        for leaf, tensor in tensors.items()
    )
    # The B of a new pair is zero, in nobody's block yet.
    in_blocks = in_blocks and any(
        arrays[leaf].any() for leaf, tensor in tensors.items() if "out" in tensor.axes
    )
    own = rank // count if in_blocks else rank
    config = with_rank(whole.config, own) if rank else whole.config
    for i, module in enumerate(whole.parts):
        assert module is not None
        start = i * own if in_blocks else 0
        values = {
            leaf: arrays[leaf][_block(whole, tensor, i, start, own)]
            for leaf, tensor in tensors.items()
        }
        yield module, config, values


def _rank(config: Any) -> int:
    """The rank of an adapter, 0 of one that has none."""
    return getattr(config, "rank", 0)


def _block(
    whole: Whole, tensor: Tensor, part: int, start: int, rank: int
) -> tuple[np.ndarray, ...]:
    """Where a part of a whole, with `rank` ranks from the `start`-th on, lies in a variable."""
    places = {"out": whole.columns[part], "rank": np.arange(start, start + rank)}
    sizes = zip(tensor.axes, tensor.shape, strict=True)
    return np.ix_(*(places[axis] if axis in places else np.arange(size) for axis, size in sizes))


def _is_in_blocks(whole: Whole, tensor: Tensor, array: np.ndarray, own: int) -> bool:
    """Whether a variable has nothing outside of the blocks of its parts, of `own` ranks each."""
    outside = np.ones(tensor.shape, np.bool_)
    for i in range(len(whole.parts)):
        outside[_block(whole, tensor, i, i * own, own)] = False
    return not array[outside].any()
