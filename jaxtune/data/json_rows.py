"""JSON rows: one object a line, an array of objects, or a single object.

Lines are split on b"\\n" alone: `str.splitlines` also splits on characters that JSON strings may
hold as they are (U+2028, U+0085). A bad line becomes a `BadRow` and reading goes on; the caller
decides what to do with it. An array is one value: a syntax error in it ends the reading.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxtune.data.rows import BadRow, Record, RowError, as_fields, number_rows
from jaxtune.errors import DataError

BOM = b"\xef\xbb\xbf"


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
                yield Record(origin, as_fields(_parse(line)))
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


def read_array(place: Path, content: bytes) -> Iterator[Record | BadRow]:
    """The elements of one JSON array; an object is the only row of its file.

    Raises:
        DataError: it is not valid JSON.
    """
    try:
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{place}:{line}: invalid UTF-8 - save the file as UTF-8") from error
    try:
        rows = DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}: column {error.colno}"
        raise DataError(f"{where}: invalid JSON: {error.msg} - repair the file") from error
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply - repair the file") from error
    except RowError as error:
        where = f"{place}: {error.field}: {error.reason}"
        raise DataError(f"{where} - repair the file") from error
    except ValueError as error:
        raise DataError(f"{place}: {str(error).partition(';')[0]} - repair the file") from error
    yield from number_rows(place, rows if isinstance(rows, list) else [rows])


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
