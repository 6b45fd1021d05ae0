"""Plain text -> rows with one field, `text`."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxtune.data.json_rows import BOM
from jaxtune.data.rows import BadRow, Record


def read_text(place: Path, file: BinaryIO, max_bytes: int, rows: str) -> Iterator[Record | BadRow]:
    """The rows of a text file.

    Args:
        place: its name, for origins.
        file: open at its beginning.
        max_bytes: longest accepted row.
        rows: "line", "paragraph" (lines up to a blank one) or "file". Line breaks at a row's end
            are not part of it.
    """
    for origin, content in _pieces(place, file, max_bytes, rows):
        if len(content) > max_bytes:
            yield BadRow(origin, "", f"longer than data.max_line_bytes={max_bytes}")
            continue
        try:
            yield Record(origin, {"text": content.decode("utf-8").rstrip("\r\n")})
        except UnicodeDecodeError as error:
            yield BadRow(origin, "", f"byte {error.start + 1}: invalid UTF-8")


def _pieces(place: Path, file: BinaryIO, max_bytes: int, rows: str) -> Iterator[tuple[str, bytes]]:
    """Origin and bytes of each row; of one that is too long only so many that it shows."""
    kept = b""
    first = 1
    for number, line in enumerate(_lines(file, max_bytes), 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if rows == "line":
            yield f"{place}:{number}", line
        elif rows == "paragraph" and not line.strip():
            if kept:
                yield f"{place}:{first}", kept
            kept = b""
        else:
            first = first if kept else number
            kept = (kept + line)[: max_bytes + 1]
    if kept:
        yield f"{place}:{first}", kept


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines, cut behind `max_bytes` + 1 bytes."""
    while line := file.readline(max_bytes + 1):
        rest = line
        while len(rest) and not rest.endswith(b"\n"):
            rest = file.readline(1 << 20)
        yield line
