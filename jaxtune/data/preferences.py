"""Rows that judge answers: preferences, rated answers (KTO).

Layouts are those of LLaMA-Factory (ranking, kto_tag), TRL (prompt, chosen, rejected, or an implicit
prompt), ms-swift (rejected_response) and PaddleNLP (response, sort).
"""

from collections.abc import Sequence
from typing import Any

from jaxtune.data import conversations
from jaxtune.data.examples import Message, Preference, Rated
from jaxtune.data.fields import first_of, items_of, label_of, optional, required, text_of
from jaxtune.data.rows import RowError
from jaxtune.data.turns import message_of, messages_of, tools_of

CHOSEN = ("chosen", "chosen_messages")
REJECTED = ("rejected", "rejected_messages")
LABELS = ("kto_tag", "label")
TURNS = ("messages", "conversations")


def preference(fields: dict[str, Any]) -> Preference:
    """chosen and rejected: texts, turns, or conversations with a common beginning."""
    names = first_of(fields, CHOSEN), first_of(fields, REJECTED)
    given = [fields.get(name) for name in names]
    if given[0] == given[1]:
        raise RowError(names[1], "is the same as the chosen one")
    if all(isinstance(turns, list) for turns in given):
        lists = (fields[name] for name in (*TURNS, "prompt") if isinstance(fields.get(name), list))
        before = next(lists, [])
        chosen, rejected = (
            messages_of([*before, *items_of(fields, name, "turns")], name) for name in names
        )
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        return Preference(prompt, chosen, rejected, tools=tools_of(fields))
    answers = [_ending(value, name) for name, value in zip(names, given, strict=True)]
    if not any(name in fields for name in ("prompt", "instruction", *TURNS)):
        return _common_beginning(*(answer.content for answer in answers))
    is_raw = isinstance(fields.get("prompt"), str)
    chosen, rejected = answers
    return Preference(_prompt(fields), (chosen,), (rejected,), tools=tools_of(fields), raw=is_raw)


def _ending(value: Any, name: str) -> Message:
    """An answer given as a turn or as its text."""
    if isinstance(value, dict):
        return message_of(value, name)
    return Message("assistant", text_of(value, name))


def _common_beginning(chosen: str, rejected: str) -> Preference:
    """Splits two whole texts where they part; the space before the answers is theirs (as TRL)."""
    shared = _shared(chosen, rejected)
    shared -= chosen[:shared].endswith(" ")
    prompt = (Message("user", chosen[:shared]),)
    ends = (Message("assistant", chosen[shared:]), Message("assistant", rejected[shared:]))
    return Preference(prompt, ends[:1], ends[1:], raw=True)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _prompt(fields: dict[str, Any]) -> tuple[Message, ...]:
    """The turns before the judged answer, which the user or a tool ends."""
    name = first_of(fields, (*TURNS, "prompt"))
    if isinstance(fields.get(name), list):
        return messages_of(fields[name], name, optional(fields, "system"), ("user", "tool"))
    return tuple(conversations.question(fields, ("instruction", "prompt")))


def rejected_answer(fields: dict[str, Any]) -> Preference:
    """messages that end with the chosen answer; rejected_response, or rejected_messages."""
    turns = conversations.messages(fields).messages
    tools = tools_of(fields)
    if isinstance(fields.get("rejected_messages"), list):
        other = messages_of(fields["rejected_messages"], "rejected_messages")
        return Preference(turns[:-1], turns[-1:], other[-1:], tools=tools)
    rejected = Message("assistant", required(fields, "rejected_response"))
    return Preference(turns[:-1], turns[-1:], (rejected,), tools=tools)


def ranked(fields: dict[str, Any]) -> Preference:
    """PaddleNLP: src, tgt (one turn fewer), response (two answers), sort (the larger is better)."""
    answers = items_of(fields, "response", "two answers")
    order = items_of(fields, "sort", "two numbers")
    for name, given in (("response", answers), ("sort", order)):
        if len(given) != 2:
            raise RowError(name, f"has {len(given)} items; it must have two")
    if not all(isinstance(place, int | float) for place in order) or order[0] == order[1]:
        raise RowError("sort", f"is {order}; it must hold two different numbers")
    texts = [text_of(text, f"response[{index}]") for index, text in enumerate(answers)]
    if not all(texts):
        raise RowError(f"response[{texts.index('')}]", "is empty")
    better = texts if order[0] > order[1] else texts[::-1]
    turns = conversations.src_tgt(_with_answer(fields, better[0])).messages
    return Preference(turns[:-1], turns[-1:], (Message("assistant", better[1]),))


def _with_answer(fields: dict[str, Any], answer: str) -> dict[str, Any]:
    asked, answered = fields.get("src"), fields.get("tgt") or []
    return {
        **fields,
        "src": asked if isinstance(asked, list) else [asked],
        "tgt": [*(answered if isinstance(answered, list) else [answered]), answer],
    }


def rated(fields: dict[str, Any]) -> Rated:
    """A conversation in any layout, and kto_tag or label: whether its last answer is good."""
    name = first_of(fields, LABELS)
    good = label_of(fields.get(name), name)
    layout = first_of(fields, tuple(CONVERSATIONS))
    example = CONVERSATIONS[layout](fields)
    return Rated(example.messages, good, tools=example.tools, raw=example.raw)


CONVERSATIONS = {
    "messages": conversations.messages,
    "conversations": conversations.sharegpt,
    "completion": conversations.prompt_completion,
    "output": conversations.alpaca,
}
