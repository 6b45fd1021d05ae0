"""Where a run stands in its data, and whether other data can be gone on with there."""

from collections.abc import Sequence
from typing import Any

from jaxtune.data.locations import Source
from jaxtune.errors import DataError, WeightError

Position = dict[str, Any]

# The options that change what a row of the training data is; a change of one is a change of data.
ROW_OPTIONS = (
    *("format", "max_seq_len", "packing", "packer", "isolated", "loss_weights", "train_on"),
    *("overlong", "shuffle", "mix", "weights", "repeats", "max_samples"),
)


def identity_of(found: Sequence[Source]) -> list[tuple[Any, ...]]:
    """How sources are read and drawn from; what they are called and where they lie do not count."""
    return [
        (len(s.files), s.format, sorted(s.columns.items()), sorted(s.tags.items()), s.num_samples)
        for s in found
    ]


def check_position(position: Position, mine: Position) -> None:
    """Compares where a run stood with a position of the data at hand.

    Raises:
        WeightError: the tokenizer is another one.
        DataError: the data, their options or the seed are.
    """
    advice = "so its order cannot be continued - restore it, or set data.allow_change=true"
    if position.get("tokenizer", mine["tokenizer"]) != mine["tokenizer"]:
        raise WeightError(f"the tokenizer or its chat template is not the run's, {advice}")
    if position["fingerprint"] != mine["fingerprint"]:
        raise DataError(f"the training data or their options differ from the run's, {advice}")
    if position["seed"] != mine["seed"]:
        raise DataError(
            f"train.seed={mine['seed']} differs from the run's {position['seed']}, {advice}"
        )
