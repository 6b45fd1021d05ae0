"""Tokenized rows in flat arrays, in memory or mapped from files larger than it.

A table in files is a folder: `tokens.bin` and `trained.bin` (with labels also `types.bin` and
`labels.bin`) hold the rows one after the other, the `.npy` files one entry for each row or record,
and `meta.json` what is known of the whole.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.data.batch import TokenRow

META = "meta.json"
TOKEN, FLAG = np.dtype("<i4"), np.dtype(bool)
TYPE, LABEL = np.dtype(np.uint8), np.dtype("<f4")


class Chunk(NamedTuple):
    """Some records, tokenized.

    Attributes:
        tokens: int32 [N], the ids of all rows, one row after the other.
        trained: bool [N], whether a token is a target.
        lengths: int64 [R], tokens of each row.
        targets: int64 [R], trained tokens of each row.
        owners: int64 [R], the row's record, from 0.
        counts: int64 [E, C], for each record what became of it (`chunks.COUNTED`).
        bad: records that could not be used, and why.
        overlong: rows that are refused because they are too long.
        types: uint8 [N], which text of a pair a token belongs to; with labels only.
        labels: float32 [M, C], of all trained tokens (see `TokenRow`); with labels only.
    """

    tokens: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    bad: list[str]
    overlong: list[str]
    types: np.ndarray = np.empty(0, TYPE)
    labels: np.ndarray = np.empty((0, 0), LABEL)


@dataclass(frozen=True, eq=False)
class RowLabels:
    """What rows with labels have besides their tokens.

    Attributes:
        types: uint8 [N], of all tokens.
        labels: float32 [M, C], of all tokens that have one.
        starts: int64 [R], where the labels of each row begin.
    """

    types: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Rows that can be read in any order: `table[i]` is a `TokenRow`.

    Attributes:
        tokens, trained: int32 and bool [N], of all rows.
        starts: int64 [R], where each row begins in them.
        lengths: int64 [R], tokens of each row.
        room: places of a prompt before each row, which the arrays do not hold.
        labelled: what rows with labels have besides; None: they have none.
        paired: rows are a source, which is not trained, and its target behind it.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    room: int = 0
    labelled: RowLabels | None = None
    paired: bool = False

    @property
    def label_columns(self) -> int:
        """Numbers of a token's label; 0: there are no labels."""
        return 0 if self.labelled is None else self.labelled.labels.shape[1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> TokenRow:
        start = self.starts[index]
        stop = start + self.lengths[index]
        row = TokenRow(self.tokens[start:stop], self.trained[start:stop])
        if self.labelled is not None:
            first = self.labelled.starts[index]
            last = first + np.count_nonzero(row.trained)
            labels = self.labelled.labels[first:last]
            return row._replace(types=self.labelled.types[start:stop], labels=labels)
        if not self.room:
            return row
        room = np.zeros(self.room, np.int32)
        return TokenRow(np.append(room, row.tokens), np.append(room > 0, row.trained))

    def select(self, rows: np.ndarray) -> "TokenTable":
        """The table of some rows, given as bool [R] or indices."""
        own = self.labelled
        if own is not None:
            own = dataclasses.replace(own, starts=own.starts[rows])
        return TokenTable(
            self.tokens, self.trained, self.starts[rows], self.lengths[rows], labelled=own
        )


def table_of(rows: Iterable[TokenRow]) -> TokenTable:
    """A table in memory."""
    rows = list(rows)
    lengths = np.array([len(row.tokens) for row in rows], np.int64)
    tokens = [np.empty(0, TOKEN), *(row.tokens for row in rows)]
    trained = [np.empty(0, FLAG), *(row.trained for row in rows)]
    return TokenTable(
        np.concatenate(tokens), np.concatenate(trained), np.cumsum(lengths) - lengths, lengths
    )


def joined(chunks: Sequence[Chunk]) -> TokenTable:
    """The rows of all chunks as one table in memory."""
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    return TokenTable(
        np.concatenate([chunk.tokens for chunk in chunks]),
        np.concatenate([chunk.trained for chunk in chunks]),
        np.cumsum(lengths) - lengths,
        lengths,
    )


@dataclass(frozen=True, eq=False)
class Tokenized:
    """A table with what is known of its rows and records.

    Attributes:
        table: all rows.
        targets, owners, counts: as in `Chunk`, of all records.
        highest: the largest token id, -1 without rows.
        digest: sha256 of the rows.
        sizes: records of each source; records of a source follow each other.
    """

    table: TokenTable
    targets: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    highest: int
    digest: str
    sizes: tuple[int, ...]


def write(folder: Path, chunks: Iterable[Chunk], sizes: Callable[[], Sequence[int]]) -> None:
    """Writes a table chunk by chunk, into an empty folder; at last what says that it is whole.

    Args:
        folder: where to.
        chunks: of all sources, one after the other.
        sizes: records of each source, asked for after the last chunk.
    """
    digest, highest, num_records, label_columns = hashlib.sha256(), -1, 0, 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _FLAT}
        for chunk in chunks:
            for name, dtype in _FLAT.items():
                part = getattr(chunk, name).astype(dtype)
                digest.update(part.tobytes())
                part.tofile(files[name])
            digest.update(chunk.lengths.tobytes())
            chunk = chunk._replace(owners=chunk.owners + num_records)
            for name, column in columns.items():
                column.append(getattr(chunk, name))
            highest = max(highest, int(chunk.tokens.max(initial=-1)))
            num_records += len(chunk.counts)
            label_columns = max(label_columns, chunk.labels.shape[1])
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(column))
    meta = {"highest": highest, "digest": digest.hexdigest(), "label_columns": label_columns}
    meta["sizes"] = list(sizes())
    (folder / META).write_text(json.dumps(meta))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


# What is mapped, and its dtypes; types and labels are empty where there are no labels.
_FLAT = {"tokens": TOKEN, "trained": FLAG, "types": TYPE, "labels": LABEL}
_COLUMNS = ("lengths", "targets", "owners", "counts")
_KNOWN = {"highest", "digest", "label_columns", "sizes"}  # fields of META


def read(folder: Path) -> Tokenized:
    """Maps a table that `write` left; nothing but its columns is read.

    Raises:
        OSError, ValueError: a file is missing, damaged or of another size than it was written with.
    """
    meta = json.loads((folder / META).read_text())
    if not isinstance(meta, dict) or meta.keys() != _KNOWN:
        raise ValueError(f"{folder / META} is damaged")
    try:
        columns = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _COLUMNS}
    except EOFError as error:  # an empty file
        raise ValueError(f"{folder}: a column is damaged: {error}") from error
    lengths, targets, width = columns.pop("lengths"), columns["targets"], meta["label_columns"]
    count = int(lengths.sum())
    sizes = {"tokens": count, "trained": count}
    sizes |= {"types": count if width else 0, "labels": int(targets.sum()) * width}
    flat = {name: _map(folder / f"{name}.bin", _FLAT[name], size) for name, size in sizes.items()}
    labelled = None
    if width:
        labels = flat["labels"].reshape(-1, width)
        labelled = RowLabels(flat["types"], labels, np.cumsum(targets) - targets)
    table = TokenTable(
        flat["tokens"],
        flat["trained"],
        np.cumsum(lengths) - lengths,
        lengths,
        labelled=labelled,
    )
    known = {"highest": meta["highest"], "digest": meta["digest"], "sizes": tuple(meta["sizes"])}
    return Tokenized(table, **known, **columns)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path} is damaged")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
