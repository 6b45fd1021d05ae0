"""Tokenized rows in flat arrays, in memory or mapped from files larger than it.

A table in files is a folder: `tokens.bin` and `trained.bin` hold the rows one after the other, the
`.npy` files one entry for each row or record, and `meta.json` what is known of the whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.data.batch import TokenRow

META = "meta.json"
TOKEN, FLAG = np.dtype("<i4"), np.dtype(bool)


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
    """

    tokens: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    bad: list[str]
    overlong: list[str]


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Rows that can be read in any order: `table[i]` is a `TokenRow`.

    Attributes:
        tokens, trained: int32 and bool [N], of all rows.
        starts: int64 [R], where each row begins in them.
        lengths: int64 [R], tokens of each row.
        room: places of a prompt before each row, which the arrays do not hold.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    room: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> TokenRow:
        start = self.starts[index]
        stop = start + self.lengths[index]
        row = TokenRow(self.tokens[start:stop], self.trained[start:stop])
        if not self.room:
            return row
        room = np.zeros(self.room, np.int32)
        return TokenRow(np.append(room, row.tokens), np.append(room > 0, row.trained))

    def select(self, rows: np.ndarray) -> "TokenTable":
        """The table of some rows, given as bool [R] or indices."""
        return TokenTable(self.tokens, self.trained, self.starts[rows], self.lengths[rows])


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
    digest, highest, num_records, num_tokens = hashlib.sha256(), -1, 0, 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "trained.bin").open("wb") as flags:
        for chunk in chunks:
            parts = [chunk.tokens.astype(TOKEN), chunk.trained.astype(FLAG), chunk.lengths]
            for part in parts:
                digest.update(part.tobytes())
            parts[0].tofile(tokens)
            parts[1].tofile(flags)
            chunk = chunk._replace(owners=chunk.owners + num_records)
            for name, column in columns.items():
                column.append(getattr(chunk, name))
            highest = max(highest, int(chunk.tokens.max(initial=-1)))
            num_records += len(chunk.counts)
            num_tokens += len(chunk.tokens)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(column))
    meta = {"highest": highest, "digest": digest.hexdigest(), "tokens": num_tokens}
    meta["sizes"] = list(sizes())
    (folder / META).write_text(json.dumps(meta))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


_COLUMNS = ("lengths", "targets", "owners", "counts")
_KNOWN = {"highest", "digest", "tokens", "sizes"}  # fields of META


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
    lengths = columns.pop("lengths")
    table = TokenTable(
        _map(folder / "tokens.bin", TOKEN, meta["tokens"]),
        _map(folder / "trained.bin", FLAG, meta["tokens"]),
        np.cumsum(lengths) - lengths,
        lengths,
    )
    known = {"highest": meta["highest"], "digest": meta["digest"], "sizes": tuple(meta["sizes"])}
    return Tokenized(table, **known, **columns)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path} is damaged")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
