"""Reads the fields of a row, each checked; what does not fit raises a RowError that names it."""

import json
from typing import Any

from jaxtune.data.rows import RowError, json_name


def text_of(value: Any, field: str) -> str:
    """A string that a tokenizer can take.

    Raises:
        RowError: it is none, or holds U+0000 or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowError(field, f"must be a string, not {json_name(value)}")
    if "\0" in value:
        raise RowError(field, f"character {value.index(chr(0)) + 1} is U+0000")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, f"character {error.start + 1} is half of a surrogate pair") from error
    return value


def required(fields: dict[str, Any], name: str) -> str:
    """The text of a field that must be there."""
    if name not in fields:
        raise RowError(name, "is missing")
    return text_of(fields[name], name)


def optional(fields: dict[str, Any], name: str) -> str:
    """The text of a field, or nothing where it is absent or null."""
    value = fields.get(name)
    return "" if value is None else text_of(value, name)


def first_of(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of several names that the row has (the first of all where it has none)."""
    return next((name for name in names if fields.get(name) is not None), names[0])


def items_of(fields: dict[str, Any], name: str, what: str) -> list[Any]:
    """A list, also one written as JSON in a string (as CSV and Parquet files often hold it)."""
    value = parsed(fields.get(name), name)
    if not isinstance(value, list):
        found = "is missing" if name not in fields else f"is {json_name(value)}"
        raise RowError(name, f"{found}; it must be a list of {what}")
    return value


def object_of(value: Any, field: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise RowError(field, f"must be an object, not {json_name(value)}")
    return value


def parsed(value: Any, field: str) -> Any:
    """The value, or what the string says if it is a JSON object or list.

    Raises:
        RowError: it begins like one and is none.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(field, f"holds invalid JSON: {error}") from error


def content_of(value: Any, field: str) -> str:
    """The text of a message: a string, or a list of text parts (OpenAI's content parts)."""
    if not isinstance(value, list):
        return text_of(value, field)
    parts = []
    for index, part in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else json_name(part)
            raise RowError(where, f"is {kind}; only parts of type text can be learnt")
        name = first_of(part, ("text", "value"))
        parts.append(text_of(part.get(name), f"{where}.{name}"))
    return "".join(parts)


def label_of(value: Any, field: str) -> bool:
    """A yes or no: a boolean, 0 or 1, or those words."""
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    word = str(value).lower().removesuffix(".0")
    if word not in words:
        raise RowError(field, f"is {value!r}; it must be true or false")
    return words[word]
