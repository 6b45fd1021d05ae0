"""Lists of turns -> checked messages: OpenAI's layout and ShareGPT's, under their many names.

A turn has a role (`role` or `from`) and a text (`content` or `value`, a string or a list of text
parts). A ShareGPT turn `function_call` is an answer that only calls tools; `observation` is a
tool's result.
"""

from collections.abc import Sequence
from typing import Any

from jaxtune.data.examples import ROLES, Message
from jaxtune.data.fields import (
    content_of,
    first_of,
    items_of,
    label_of,
    object_of,
    optional,
    parsed,
)
from jaxtune.data.rows import RowError, json_name

CALL = "function_call"
ROLE_NAMES: dict[str, str] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    CALL: CALL,
    "tool_call": CALL,
}
MARKS = ("train", "weight", "loss", "loss_weight")
# What may follow; a tool's result also follows an answer that writes its call as plain text.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def messages_of(
    given: Sequence[Any], where: str, system: str = "", last: tuple[str, ...] = ("assistant",)
) -> tuple[Message, ...]:
    """Reads a list of turns in OpenAI's or ShareGPT's layout.

    Args:
        given: the turns.
        where: name of their field, for messages.
        system: a system text that stands elsewhere in the row; a system turn replaces it.
        last: the roles that may have the last word.

    Raises:
        RowError: a turn is malformed or out of order.
    """
    if not given:
        raise RowError(where, "is empty")
    messages = tuple(message_of(turn, f"{where}[{i}]") for i, turn in enumerate(given))
    _check_order(messages, where, last)
    return with_system(messages, system)


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The messages behind a system text, unless it is empty or they bring one."""
    if not system or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def message_of(turn: Any, where: str) -> Message:
    """Reads one turn; RowError where it is malformed."""
    if not isinstance(turn, dict):
        raise RowError(where, f"must be an object, not {json_name(turn)}")
    role_field = first_of(turn, ("role", "from"))
    given = turn.get(role_field)
    role = ROLE_NAMES.get(given) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(ROLE_NAMES)
        raise RowError(f"{where}.{role_field}", f"is {given!r}; it must be one of {known}")
    content_field = first_of(turn, ("content", "value"))
    content = turn.get(content_field)
    if role == CALL:
        calls = _calls(parsed(content, f"{where}.{content_field}"), f"{where}.{content_field}")
        return Message("assistant", "", tool_calls=calls, trained=_is_trained(turn, where))
    calls = _calls(turn["tool_calls"], f"{where}.tool_calls") if turn.get("tool_calls") else ()
    if calls and role != "assistant":
        raise RowError(f"{where}.tool_calls", f"is given for the role {role}")
    text = "" if content is None and calls else content_of(content, f"{where}.{content_field}")
    return Message(
        role,
        text,
        reasoning=optional(turn, first_of(turn, ("reasoning_content", "reasoning", "thinking"))),
        tool_calls=calls,
        name=optional(turn, "name") if role == "tool" else "",
        call_id=optional(turn, "tool_call_id"),
        trained=_is_trained(turn, where) if role == "assistant" else True,
    )


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    name = first_of(turn, MARKS)
    return True if turn.get(name) is None else label_of(turn[name], f"{where}.{name}")


def _calls(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in OpenAI's form, from that or from bare {name, arguments}."""
    calls = []
    for index, call in enumerate(given if isinstance(given, list) else [given]):
        place = f"{where}[{index}]"
        bare = object_of(call, place)
        function = object_of(parsed(bare.get("function") or bare, place), place)
        name = optional(function, "name")
        if not name:
            raise RowError(f"{place}.name", "is missing")
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = parsed(arguments, f"{place}.arguments")
        tool_call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append({"id": call["id"], **tool_call} if call.get("id") else tool_call)
    return tuple(calls)


def tools_of(fields: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools in OpenAI's form, from that or from bare {name, ...}.

    Raises:
        RowError: they are no list of objects with names.
    """
    if not fields.get("tools"):
        return ()
    tools = []
    for index, given in enumerate(items_of(fields, "tools", "{name, description, parameters}")):
        where = f"tools[{index}]"
        tool = object_of(parsed(given, where), where)
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        if not optional(object_of(tool["function"], where), "name"):
            raise RowError(f"{where}.name", "is missing")
        tools.append(tool)
    return tuple(tools)


def _check_order(messages: Sequence[Message], where: str, last: tuple[str, ...]) -> None:
    before = ""
    for index, message in enumerate(messages):
        if message.role not in FOLLOWERS[before]:
            due = " or ".join(FOLLOWERS[before])
            after = f"after the turns before it {due} is due"
            raise RowError(f"{where}[{index}].role", f"is {message.role}; {after}")
        before = message.role
    if before not in last:
        whose = "assistant's answer" if "assistant" in last else "user's turn"
        raise RowError(where, f"must end with the {whose}")
