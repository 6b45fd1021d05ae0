"""Files and folders -> records, each with the place it came from.

The kind of a file is read from its first bytes, never from its name: gzip, Parquet, a JSON array,
or one JSON object a line. A folder is one that `datasets.save_to_disk` wrote; its Arrow files are
read directly, so the `datasets` package is not needed.

Lines are split on b"\\n" alone: `str.splitlines` also splits on characters that JSON strings may
hold as they are (U+2028, U+0085). A bad line becomes a `BadRow` and reading goes on; the caller
decides what to do with it. A JSON array is one value: a syntax error in it ends the reading.
"""

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from jaxtune.errors import DataError

BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One row as it was read: its origin ("file:line" or "file:row n") and its fields."""

    origin: str
    fields: dict[str, Any]


class BadRow(NamedTuple):
    """A row that cannot be used: where it is, which field (may be empty), and why."""

    origin: str
    field: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class RowError(Exception):
    """Raised while one row is read, converted or rendered; names the field and the reason."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def read(path: str, max_line_bytes: int) -> Iterator[Record | BadRow]:
    """Yields the rows of one file or `datasets` folder.

    Raises:
        DataError: the path does not exist or cannot be read, or its content is of no known kind.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"data file {path} does not exist{_neighbours(place)}")
    try:
        if place.is_dir():
            yield from _read_folder(place)
            return
        with place.open("rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            yield from _read_parquet(place)
            return
        with _open(place, magic) as file:
            if _starts_array(file):
                file.seek(0)
                yield from _read_array(place, file.read())
            else:
                file.seek(0)
                yield from read_lines(place, file, max_line_bytes)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read {path}: {reason} - check the file") from error


def hash_files(paths: Sequence[str]) -> str:
    """sha256 over the contents of all files, in order; names and places do not count."""
    total = hashlib.sha256()
    for path in paths:
        place = Path(path).expanduser()
        for file in sorted(place.rglob("*.arrow")) if place.is_dir() else [place]:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _neighbours(place: Path) -> str:
    """A hint for a path that does not exist: similar names beside it."""
    folder = place.parent
    if not folder.is_dir():
        return f" - there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(place.name, names, n=3, cutoff=0.5)
    if close:
        return f" - did you mean {' or '.join(str(folder / name) for name in close)}?"
    return f" - {folder} holds {', '.join(names[:8]) or 'nothing'}"


def _open(place: Path, magic: bytes) -> BinaryIO:
    """Opens a file for reading, through gzip when its first bytes say so."""
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(place))
    return place.open("rb")


def _starts_array(file: BinaryIO) -> bool:
    head = file.read(1 << 16).removeprefix(BOM).lstrip()
    return head.startswith(b"[")


def read_lines(place: Path, file: BinaryIO, max_line_bytes: int) -> Iterator[Record | BadRow]:
    """One JSON object a line; blank lines count but hold nothing."""
    number = 0
    while line := file.readline(max_line_bytes + 1):
        number += 1
        origin = f"{place}:{number}"
        if len(line) > max_line_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield BadRow(origin, "", f"longer than data.max_line_bytes={max_line_bytes}")
            continue
        if number == 1:
            line = line.removeprefix(BOM)
        if line := line.strip(b" \t\r\n"):
            try:
                yield Record(origin, _as_fields(_parse(line)))
            except RowError as error:
                yield BadRow(origin, error.field, error.reason)


def _parse(line: bytes) -> Any:
    """Parses one line of strict JSON."""
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("", f"byte {error.start + 1}: invalid UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError("", f"column {error.colno}: invalid JSON: {error.msg}") from error
    except RecursionError as error:
        raise RowError("", "nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise RowError("", str(error).partition(";")[0]) from error


def _read_array(place: Path, content: bytes) -> Iterator[Record | BadRow]:
    """The elements of one JSON array."""
    try:
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{place}:{line}: invalid UTF-8 - save the file as UTF-8") from error
    try:
        rows = DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}: column {error.colno}"
        raise DataError(f"{where}: invalid JSON: {error.msg} - repair the array") from error
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply - repair the array") from error
    except RowError as error:
        where = f"{place}: {error.field}: {error.reason}"
        raise DataError(f"{where} - repair the array") from error
    except ValueError as error:
        raise DataError(f"{place}: {str(error).partition(';')[0]} - repair the array") from error
    yield from _number_rows(place, rows)


def _read_parquet(place: Path) -> Iterator[Record | BadRow]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(place)
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        yield from _number_rows(place, rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {place} as Parquet: {error} - check the file") from error


def _read_folder(place: Path) -> Iterator[Record | BadRow]:
    """The rows of a folder written by `datasets.save_to_disk`."""
    import pyarrow

    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_bytes())["splits"]
        names = " or ".join(str(place / split) for split in splits)
        raise DataError(f"{place} holds several splits - name one: {names}")
    try:
        state = json.loads((place / "state.json").read_bytes())
        files = [place / entry["filename"] for entry in state["_data_files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place} is not a folder that datasets.save_to_disk wrote - name a file in it"
        ) from error

    def rows() -> Iterator[dict[str, Any]]:
        for file in files:
            with pyarrow.memory_map(str(file)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from batch.to_pylist()

    try:
        yield from _number_rows(place, rows())
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {place}: {error} - save the dataset again") from error


def _number_rows(place: Path, rows: Any) -> Iterator[Record | BadRow]:
    for number, row in enumerate(rows, 1):
        origin = f"{place}:row {number}"
        try:
            yield Record(origin, _as_fields(row))
        except RowError as error:
            yield BadRow(origin, error.field, error.reason)


def _as_fields(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError("", f"a row must be an object of fields, not {json_name(row)}")
    return row


def json_name(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RowError(double, "is given twice in one object")
    return fields


def _refuse_constant(name: str) -> Any:
    raise RowError("", f"{name} is not JSON")


# Python's parser by itself keeps the last of two equal keys and accepts NaN and Infinity.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
