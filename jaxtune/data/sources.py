"""One file or `datasets` folder -> records, each with the place it came from.

The kind of a file is read from its first bytes, never from its name: gzip, Parquet, Arrow, a JSON
array, one JSON object a line, CSV, else plain text. The name decides one thing: what is called
.json or .jsonl is never taken for plain text, so that a damaged file is not learnt as it stands.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from jaxtune.data.json_rows import BOM, read_array, read_lines
from jaxtune.data.rows import BadRow, Record
from jaxtune.data.tables import (
    csv_delimiter,
    is_saved,
    read_arrow,
    read_csv,
    read_parquet,
    read_saved,
)
from jaxtune.data.texts import read_text
from jaxtune.errors import DataError

SNIFFED_BYTES = 1 << 16
JSON_NAMES = (".json", ".jsonl", ".ndjson")


def read(
    path: str | Path, max_line_bytes: int, text_rows: str = "line"
) -> Iterator[Record | BadRow]:
    """Yields the rows of one file or `datasets` folder.

    Args:
        path: a file, or a folder that `datasets.save_to_disk` wrote.
        max_line_bytes: longest accepted line or row.
        text_rows: what is a row of plain text (see `texts.read_text`).

    Raises:
        DataError: the path does not exist or cannot be read, or its content is damaged.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            if not is_saved(place):
                raise DataError(
                    f"{place} is not a folder that datasets.save_to_disk wrote - name its files"
                )
            yield from read_saved(place)
            return
        with place.open("rb") as file:
            magic = file.read(6)
        if magic.startswith(b"PAR1"):
            yield from read_parquet(place)
        elif magic == b"ARROW1" or magic.startswith(b"\xff\xff\xff\xff"):
            yield from read_arrow(place)
        else:
            with _open(place, magic) as file:
                yield from _read_text_file(place, file, max_line_bytes, text_rows)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read {path}: {reason} - check the file") from error


def hash_files(paths: Sequence[str | Path]) -> str:
    """sha256 over the contents of all files, in order; names and places do not count."""
    total = hashlib.sha256()
    for path in paths:
        place = Path(path).expanduser()
        for file in sorted(place.rglob("*.arrow")) if place.is_dir() else [place]:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _open(place: Path, magic: bytes) -> BinaryIO:
    """Opens a file for reading, through gzip when its first bytes say so."""
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(place))
    return place.open("rb")


def _read_text_file(
    place: Path, file: BinaryIO, max_line_bytes: int, text_rows: str
) -> Iterator[Record | BadRow]:
    """The rows of a file of JSON, CSV or plain text."""
    head = file.read(SNIFFED_BYTES).removeprefix(BOM).lstrip()
    file.seek(0)
    named_json = any(suffix in JSON_NAMES for suffix in place.suffixes)
    if head.startswith(b"[") and (named_json or _opens_array(head)):
        yield from read_array(place, file.read())
    elif head.startswith(b"{"):
        if _is_one_object(head):
            yield from read_array(place, file.read())
        else:
            yield from read_lines(place, file, max_line_bytes)
    # Prose has commas, too: longer texts that were asked for are no table.
    elif text_rows == "line" and (delimiter := csv_delimiter(head.decode("utf-8", "replace"))):
        yield from read_csv(place, file, delimiter, max_line_bytes)
    elif named_json or not head:
        yield from read_lines(place, file, max_line_bytes)
    else:
        yield from read_text(place, file, max_line_bytes, text_rows)


def _opens_array(head: bytes) -> bool:
    """Whether a bracket opens a JSON array of objects, and not a line of text."""
    return head[1:].lstrip()[:1] in (b"{", b"]", b"[", b"")


def _is_one_object(head: bytes) -> bool:
    """Whether a brace opens an object over several lines, and not the first of many objects."""
    first, line_break, _ = head.partition(b"\n")
    return bool(line_break) and first.rstrip().endswith((b",", b"[", b"{")) and not _is_json(first)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
