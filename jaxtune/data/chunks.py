"""Examples -> tokenized rows that fit, with everything that was left out counted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxtune.data.batch import TokenRow
from jaxtune.data.examples import Example
from jaxtune.data.lengths import fit
from jaxtune.data.rows import BadRow, RowError
from jaxtune.data.table import FLAG, TOKEN, Chunk
from jaxtune.data.tokenize import Chat, rows_of
from jaxtune.errors import DataError, WeightError, listing
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = TypeVar("Record")
Made = TypeVar("Made")
COUNTED: tuple[str, ...] = ("bad", "truncated", "dropped", "untrained", "split", "unended")


@dataclass
class Tally:
    """Counts over all that was read so far; `floor` records at least count as read."""

    records: int = 0
    bad: int = 0
    floor: int = 0


def make_chunk(records: Sequence[Example | BadRow], chat: Chat, cfg: Data) -> Chunk:
    """Tokenizes records in one batch and applies the policies on over-long and empty rows."""
    rows: list[TokenRow] = []
    owners: list[int] = []
    counts: list[dict[str, int]] = []
    bad: list[str] = []
    overlong: list[str] = []
    for owner, example, made, count in counted(_tokenized(records, chat, cfg), counts, bad):
        count["split"] = max(len(made) - 1, 0)
        fitted = fit(example, made, chat, cfg, count)
        if cfg.overlong == "error":
            lengths = (len(row.tokens) for row in made)
            overlong += [f"{example.origin}: {n} tokens" for n in lengths if n > cfg.max_seq_len]
        usable = [row for row in fitted if example.has_answer and row.trained.any()]
        count["untrained"] = len(fitted) - len(usable) if made else 1
        count["unended"] = int(bool(usable) and not chat.is_ended(made[-1]))
        rows += usable
        owners += [owner] * len(usable)
    return joined(rows, owners, counts, bad, overlong)


def counted(
    records: Iterable[tuple[Record | BadRow, Made]], counts: list[dict[str, int]], bad: list[str]
) -> Iterator[tuple[int, Record, Made, dict[str, int]]]:
    """Each good record: its number, itself, what was made of it, and its counts, to be raised.

    Args:
        records: with what was made of each, nothing of a bad one.
        counts: a dictionary with the keys of `COUNTED` is added for each record.
        bad: what is wrong with each bad record is added.
    """
    for owner, (record, made) in enumerate(records):
        count: dict[str, int] = dict.fromkeys(COUNTED, 0)
        counts.append(count)
        if isinstance(record, BadRow):
            count["bad"] = 1
            bad.append(str(record))
        else:
            yield owner, record, made, count


def joined(
    rows: Sequence[TokenRow],
    owners: Sequence[int],
    counts: Sequence[dict[str, int]],
    bad: list[str],
    overlong: list[str],
) -> Chunk:
    """The chunk of some records' rows; see `Chunk`."""
    return Chunk(
        tokens=np.concatenate([np.empty(0, TOKEN), *(row.tokens for row in rows)]),
        trained=np.concatenate([np.empty(0, FLAG), *(row.trained for row in rows)]),
        lengths=np.array([len(row.tokens) for row in rows], np.int64),
        targets=np.array([np.count_nonzero(row.trained) for row in rows], np.int64),
        owners=np.array(owners, np.int64),
        counts=np.array([list(count.values()) for count in counts], np.int64).reshape(
            -1, len(COUNTED)
        ),
        bad=bad,
        overlong=overlong,
    )


def check_chunks(chunks: Iterable[Chunk], cfg: Data, tally: Tally | None = None) -> Iterator[Chunk]:
    """Passes chunks on and, after the last, judges what was bad in all of them.

    With a tally, which grows, the share of bad rows is that of all chunks it has counted.

    Raises:
        DataError: there are bad rows, or more than `max_bad_fraction` where they may be skipped; or
            rows are too long and `overlong` is "error".
    """
    bad: list[str] = []
    overlong: list[str] = []
    tally = Tally() if tally is None else tally
    for chunk in chunks:
        yield chunk
        bad += chunk.bad
        overlong += chunk.overlong
        tally.records += len(chunk.counts)
        tally.bad += len(chunk.bad)
    _check_bad(bad, tally, cfg)
    if overlong:
        raise DataError(
            f"{len(overlong)} rows are longer than data.max_seq_len={cfg.max_seq_len} - raise it, "
            f"or set data.overlong to truncate_right, truncate_left or drop:{listing(overlong)}"
        )


def check_vocabulary(highest: int, tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raises WeightError if the model has no embedding for the highest id.

    It would not fail on the device: the lookup there clamps it in silence.
    """
    if highest >= vocab_size:
        text = tokenizer.convert_ids_to_tokens(highest)
        raise WeightError(
            f"the tokenizer makes token id {highest} ({text!r}), but the model has only "
            f"{vocab_size} embeddings - set model.tokenizer to the model's own tokenizer"
        )


def _tokenized(
    records: Sequence[Example | BadRow], chat: Chat, cfg: Data
) -> Iterator[tuple[Example | BadRow, list[TokenRow]]]:
    """Each record and its rows; one that the chat template refuses has become a bad row."""
    good = [record for record in records if isinstance(record, Example)]
    made_of = iter(rows_of(chat, good, cfg.train_on))
    for record in records:
        made = [] if isinstance(record, BadRow) else next(made_of)
        if isinstance(record, Example) and isinstance(made, RowError):
            yield BadRow(record.origin, made.field, made.reason), []
        elif not isinstance(made, RowError):
            yield record, made


def _check_bad(bad: Sequence[str], tally: Tally, cfg: Data) -> None:
    if not bad:
        return
    found = f"{tally.bad} of {tally.records} rows are bad"
    if cfg.on_bad_row == "error":
        raise DataError(f"{found} - repair them, or set data.on_bad_row=skip:{listing(bad)}")
    if tally.bad > cfg.max_bad_fraction * max(tally.records, tally.floor):
        raise DataError(
            f"{found}, more than data.max_bad_fraction={cfg.max_bad_fraction} - repair them, "
            f"or raise the limit:{listing(bad)}"
        )
