"""Rows of tables: Parquet, Arrow, CSV, and the folders that `datasets.save_to_disk` writes.

They are read with pyarrow and Python's csv; the `datasets` package is not needed.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxtune.data.rows import BadRow, Record, number_rows
from jaxtune.errors import DataError

BATCH = 1024  # rows of a Parquet file that are in memory at a time
SNIFFED_ROWS = 3
MAX_NAME_LENGTH = 64


def read_parquet(place: Path) -> Iterator[Record | BadRow]:
    """The rows of a Parquet file; DataError where it is damaged."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(place)
        rows = (row for batch in file.iter_batches(BATCH) for row in batch.to_pylist())
        yield from number_rows(place, rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {place} as Parquet: {error} - check the file") from error


def read_arrow(place: Path) -> Iterator[Record | BadRow]:
    """The rows of an Arrow file (Feather) or stream; DataError where it is damaged."""
    yield from _read_arrow_files(place, [place])


def read_saved(place: Path) -> Iterator[Record | BadRow]:
    """The rows of a folder written by `datasets.save_to_disk`.

    Raises:
        DataError: it holds several splits, or was not written so.
    """
    if is_saved_splits(place):
        splits = json.loads((place / "dataset_dict.json").read_bytes())["splits"]
        names = " or ".join(str(place / split) for split in splits)
        raise DataError(f"{place} holds several splits - name one: {names}")
    try:
        state = json.loads((place / "state.json").read_bytes())
        files = [place / entry["filename"] for entry in state["_data_files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: its state.json is damaged - save the dataset again") from error
    yield from _read_arrow_files(place, files)


def is_saved(place: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (place / "state.json").is_file() or is_saved_splits(place)


def is_saved_splits(place: Path) -> bool:
    """Whether it wrote several splits there."""
    return (place / "dataset_dict.json").is_file()


def _read_arrow_files(place: Path, files: Iterable[Path]) -> Iterator[Record | BadRow]:
    import pyarrow

    def rows() -> Iterator[dict[str, Any]]:
        for file in files:
            with pyarrow.memory_map(str(file)) as source:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                if is_file:
                    reader = pyarrow.ipc.open_file(source)
                    for index in range(reader.num_record_batches):
                        yield from reader.get_batch(index).to_pylist()
                else:
                    for batch in pyarrow.ipc.open_stream(source):
                        yield from batch.to_pylist()

    try:
        yield from number_rows(place, rows())
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {place}: {error} - save the dataset again") from error


def csv_delimiter(head: str) -> str | None:
    """The delimiter of a CSV file that begins so; None where it does not look like one.

    A table has a first row of several different short names, and the rows behind it have as many
    cells; at least one must be there.
    """
    for delimiter in (",", "\t", ";"):
        try:
            rows = list(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter))
        except csv.Error:
            continue
        rows = [row for row in rows if row][: SNIFFED_ROWS + 2]
        names, others = rows[0] if rows else [], rows[1:-1] or rows[1:]
        if (
            len(names) > 1
            and len(set(names)) == len(names)
            and all(0 < len(name.strip()) <= MAX_NAME_LENGTH for name in names)
            and others
            and all(len(row) == len(names) for row in others)
        ):
            return delimiter
    return None


def read_csv(
    place: Path, file: BinaryIO, delimiter: str, max_row_bytes: int
) -> Iterator[Record | BadRow]:
    """The rows of a CSV file; cells are texts, and empty ones are null.

    Raises:
        DataError: it is not UTF-8, or a cell is longer than `max_row_bytes`.
    """
    csv.field_size_limit(max_row_bytes)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    number = 0
    try:
        names = next(reader)
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            origin = f"{place}:row {number}"
            if len(cells) != len(names):
                yield BadRow(origin, "", f"has {len(cells)} cells, the first line {len(names)}")
            else:
                yield Record(origin, {k: v or None for k, v in zip(names, cells, strict=True)})
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: row {number + 1}: {error.reason} - save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{place}: row {number + 1}: {error} - repair the file") from error
    finally:
        text.detach()  # the caller closes the file
