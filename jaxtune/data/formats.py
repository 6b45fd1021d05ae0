"""Records -> conversations. One function a format; `FORMATS` is the table.

Every format ends in the same `Example`: an optional system message, then user and assistant turns
in alternation, the last one the assistant's. Fields that a format does not know are ignored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.data.sources import Record, RowError, json_name
from jaxtune.errors import DataError

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from, and where it came from."""

    messages: tuple[Message, ...]
    origin: str = ""


class Format(NamedTuple):
    """How a format is recognised (fields that a row must have) and converted."""

    required: tuple[str, ...]
    convert: Callable[[dict[str, Any]], list[Message]]


def to_example(record: Record, format_name: str) -> Example:
    """Converts one record.

    Raises:
        RowError: a field is missing, of the wrong type, or out of order.
    """
    messages = FORMATS[format_name].convert(record.fields)
    return Example(tuple(messages), record.origin)


def recognise(record: Record) -> str:
    """The format whose required fields the record has.

    Raises:
        DataError: no format fits; the message lists what each one needs.
    """
    for name, row in FORMATS.items():
        if all(field in record.fields for field in row.required):
            return name
    known = "; ".join(f"{name} needs {', '.join(row.required)}" for name, row in FORMATS.items())
    have = ", ".join(map(str, record.fields)) or "no fields"
    raise DataError(
        f"{record.origin}: no format fits a row with {have} ({known}) - rename the fields"
    )


def _alpaca(fields: dict[str, Any]) -> list[Message]:
    """instruction [+ input], output; optional system and history of [user, assistant] pairs."""
    messages = []
    if system := _optional(fields, "system"):
        messages.append(Message("system", system))
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"must be a list of pairs, not {json_name(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}]", "must be a pair [user, assistant]")
        messages.append(Message("user", _text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", _text(pair[1], f"history[{index}][1]")))
    question = _required(fields, "instruction")
    if extra := _optional(fields, "input"):
        question = f"{question}\n{extra}"
    messages.append(Message("user", question))
    messages.append(Message("assistant", _required(fields, "output")))
    return messages


def _openai_messages(fields: dict[str, Any]) -> list[Message]:
    """messages: a list of {role, content}, as OpenAI's chat API takes them."""
    given = fields.get("messages")
    if not isinstance(given, list):
        what = "is missing" if "messages" not in fields else f"is {json_name(given)}"
        raise RowError("messages", f"{what}; it must be a list of {{role, content}}")
    if not given:
        raise RowError("messages", "is empty")
    messages = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RowError(where, f"must be an object, not {json_name(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise RowError(f"{where}.role", f"is {role!r}; it must be one of {', '.join(ROLES)}")
        messages.append(Message(role, _text(message.get("content"), f"{where}.content")))
    _check_turns(messages)
    return messages


def _check_turns(messages: list[Message]) -> None:
    start = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            where = f"messages[{start + index}].role"
            raise RowError(where, f"is {message.role}; after the turns before it {expected} is due")
    if messages[-1].role != "assistant":
        raise RowError("messages", "must end with the assistant's answer")


def _required(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise RowError(name, "is missing")
    return _text(fields[name], name)


def _optional(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    return "" if value is None else _text(value, name)


def _text(value: Any, field: str) -> str:
    """Checks that a value is a string that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(field, f"must be a string, not {json_name(value)}")
    if "\0" in value:
        raise RowError(field, f"character {value.index(chr(0)) + 1} is U+0000")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, f"character {error.start + 1} is half of a surrogate pair") from error
    return value


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _openai_messages),
    "alpaca": Format(("instruction", "output"), _alpaca),
}
