"""The formats of rows: how each is recognised and what converts it; `FORMATS` is the table.

A format is recognised by the fields that a row must have, in the order of the table. Fields that it
does not know are ignored. Rows of any other kind go through a function of the user's first
(data.function), which makes fields of a format in the table.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxtune.data import annotations, conversations, preferences
from jaxtune.data.examples import Parsed
from jaxtune.data.rows import Record, RowError
from jaxtune.errors import ConfigError, DataError

RowFunction = Callable[[dict[str, Any]], dict[str, Any] | None]


class Format(NamedTuple):
    """How a format is recognised and converted.

    Attributes:
        required: groups of names; one of each must be a field that is not null.
        convert: from the fields of a row.
        flags: fields that must be booleans where they are given, or the format is another.
    """

    required: tuple[tuple[str, ...], ...]
    convert: Callable[[dict[str, Any]], Parsed]
    flags: tuple[str, ...] = ()

    def fits(self, fields: dict[str, Any]) -> bool:
        """Whether the row has what the format needs."""
        given = {name for name, value in fields.items() if value is not None}
        return all(given.intersection(names) for names in self.required) and all(
            isinstance(fields[name], bool) for name in given.intersection(self.flags)
        )


TURNS = ("messages", "conversations", "completion", "output")
FORMATS: dict[str, Format] = {
    "ranked": Format((("src",), ("response",), ("sort",)), preferences.ranked),
    "preference": Format((preferences.CHOSEN, preferences.REJECTED), preferences.preference),
    "rejected": Format(
        (("messages",), ("rejected_response", "rejected_messages")), preferences.rejected_answer
    ),
    "rated": Format((preferences.LABELS, TURNS), preferences.rated, flags=preferences.LABELS),
    "classified": Format(
        (("label",), (*annotations.SINGLE, *(first for first, _ in annotations.PAIRS))),
        annotations.classified,
    ),
    "messages": Format((("messages",),), conversations.messages),
    "sharegpt": Format((("conversations",),), conversations.sharegpt),
    "xtuner": Format((("conversation",),), conversations.xtuner),
    "src_tgt": Format((("src",), ("tgt",)), conversations.src_tgt),
    "alpaca": Format((("instruction",), ("output",)), conversations.alpaca),
    "multiple_choice": Format(
        (("question",), ("choices",), ("answer",)), conversations.multiple_choice
    ),
    "prompt_completion": Format((("prompt",), ("completion",)), conversations.prompt_completion),
    "qa": Format((conversations.QUESTIONS, conversations.ANSWERS), conversations.qa),
    "text": Format((("text",),), conversations.text),
    "extractive": Format((("context",), ("question",), ("answers",)), annotations.extractive),
    "document": Format((conversations.TEXTS,), conversations.document),
    "tagged": Format((annotations.WORDS, annotations.TAGS), annotations.tagged),
}


def to_example(record: Record, format_name: str) -> Parsed:
    """Converts one record.

    Raises:
        RowError: a field is missing, of the wrong type, or out of order.
    """
    return replace(FORMATS[format_name].convert(record.fields), origin=record.origin)


def recognise(record: Record) -> str:
    """The format whose required fields the record has.

    Raises:
        DataError: no format fits; the message lists what each one needs.
    """
    for name, row in FORMATS.items():
        if row.fits(record.fields):
            return name
    known = "; ".join(
        f"{name} needs {', '.join('|'.join(names) for names in row.required)}"
        for name, row in FORMATS.items()
    )
    have = ", ".join(map(str, record.fields)) or "no fields"
    raise DataError(
        f"{record.origin}: no format fits a row with {have} ({known}) - rename the fields, or map "
        "them with data.columns"
    )


def row_function(name: str) -> RowFunction:
    """The function of the user's that data.function names.

    Raises:
        ConfigError: there is nothing of that name, or it cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: importing it may raise anything
        raise ConfigError(f"data.function={name}: {error} - write module:function") from error
    if not callable(found):
        kind = type(found).__name__
        raise ConfigError(f"data.function={name} is of type {kind} - name a function of a row")
    return cast(RowFunction, found)


def row_function_source(name: str) -> bytes:
    """The text of the module in which data.function stands (another may make other rows)."""
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return b"" if file is None else Path(file).read_bytes()


def apply(function: RowFunction, fields: dict[str, Any]) -> dict[str, Any] | None:
    """What a function of the user's makes of a row's fields; None: the row is left out.

    Raises:
        RowError: it raises, or returns something else.
    """
    try:
        made = function(fields)
    except Exception as error:  # the function is the user's: whatever it raises is the row's fault
        raise RowError("", f"data.function raised {type(error).__name__}: {error}") from error
    if made is not None and not isinstance(made, dict):
        raise RowError("", f"data.function returned {type(made).__name__}, not a row's fields")
    return made
