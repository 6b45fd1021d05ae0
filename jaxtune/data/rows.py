"""Rows as they are read, before anybody knows their format, and what can be wrong with one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


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


def json_name(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def as_fields(row: Any) -> dict[str, Any]:
    """The row itself if it is an object of fields.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(row, dict):
        raise RowError("", f"a row must be an object of fields, not {json_name(row)}")
    return row


def number_rows(place: Path, rows: Iterable[Any]) -> Iterator[Record | BadRow]:
    """Rows of a file without lines, each with its number from 1."""
    for number, row in enumerate(rows, 1):
        origin = f"{place}:row {number}"
        try:
            yield Record(origin, as_fields(row))
        except RowError as error:
            yield BadRow(origin, error.field, error.reason)
