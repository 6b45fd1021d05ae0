"""Rows that say one thing to learn: conversations, questions with answers, plain texts.

Each function converts the fields of one row and raises a RowError where they do not fit; the table
in formats.py names them. Sources: alpaca, github.com/tatsu-lab/stanford_alpaca (history and system
as in LLaMA-Factory); ShareGPT, github.com/lm-sys/FastChat; src and tgt, PaddleNLP's run_finetune;
conversation, XTuner; prompt and completion, TRL's SFTTrainer.
"""

from collections.abc import Iterator
from typing import Any

from jaxtune.data.examples import Example, Message
from jaxtune.data.fields import (
    content_of,
    first_of,
    items_of,
    label_of,
    object_of,
    optional,
    required,
    text_of,
)
from jaxtune.data.rows import RowError, json_name
from jaxtune.data.turns import messages_of, tools_of, with_system

QUESTIONS = ("question", "query", "prompt", "input")
ANSWERS = ("answer", "response", "output", "target", "completion")
TEXTS = ("text", "content", "paragraphs")
TITLES = ("title", "chapter", "rhythmic")


def messages(fields: dict[str, Any]) -> Example:
    """messages: a list of {role, content}, as OpenAI's chat API takes them; optional tools."""
    return _turns(fields, "messages")


def sharegpt(fields: dict[str, Any]) -> Example:
    """conversations: a list of {from, value}; optional system and tools."""
    return _turns(fields, "conversations")


def _turns(fields: dict[str, Any], name: str) -> Example:
    given = items_of(fields, name, "{role, content}")
    turns = messages_of(given, name, optional(fields, "system"))
    return Example(turns, tools=tools_of(fields))


def alpaca(fields: dict[str, Any]) -> Example:
    """instruction [+ input], output; optional system, history of [user, assistant] pairs, tools."""
    turns = (*question(fields), Message("assistant", required(fields, "output")))
    return Example(turns, tools=tools_of(fields))


def question(fields: dict[str, Any], names: tuple[str, ...] = ("instruction",)) -> list[Message]:
    """System text, history and question of a row whose answer stands elsewhere."""
    turns = []
    if system := optional(fields, "system"):
        turns.append(Message("system", system))
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"must be a list of pairs, not {json_name(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}]", "must be a pair [user, assistant]")
        turns.append(Message("user", text_of(pair[0], f"history[{index}][0]")))
        turns.append(Message("assistant", text_of(pair[1], f"history[{index}][1]")))
    name = first_of(fields, names)
    asked = required(fields, name)
    if name != "input" and (extra := optional(fields, "input")):
        asked = f"{asked}\n{extra}" if asked else extra
    return [*turns, Message("user", asked)]


def qa(fields: dict[str, Any]) -> Example:
    """A question and its answer, under the usual names."""
    answer = required(fields, first_of(fields, ANSWERS))
    return Example((*question(fields, QUESTIONS), Message("assistant", answer)))


def multiple_choice(fields: dict[str, Any]) -> Example:
    """question, choices, answer (a letter, a number from 0, or the text of a choice)."""
    given = items_of(fields, "choices", "texts")
    choices = [text_of(text, f"choices[{index}]") for index, text in enumerate(given)]
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    answer = fields.get("answer")
    if isinstance(answer, int) and 0 <= answer < len(choices):
        letter = letters[answer]
    elif answer in choices:
        letter = letters[choices.index(answer)]
    elif answer in letters:
        letter = answer
    else:
        raise RowError("answer", f"is {answer!r}; it must name one of the choices")
    options = [f"{name}. {text}" for name, text in zip(letters, choices, strict=True)]
    asked = "\n".join([required(fields, "question"), *options])
    return Example((Message("user", asked), Message("assistant", letter)))


def src_tgt(fields: dict[str, Any]) -> Example:
    """src, tgt: two strings, or two lists of as many turns; optional context.system."""
    asked, answered = (_strings(fields, name) for name in ("src", "tgt"))
    if len(asked) != len(answered):
        raise RowError("tgt", f"has {len(answered)} turns, src has {len(asked)}")
    turns = [
        Message(role, text)
        for pair in zip(asked, answered, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return Example(with_system(tuple(turns), context_system(fields)))


def context_system(fields: dict[str, Any]) -> str:
    """The system text in PaddleNLP's `context`; its other variables belong to its templates."""
    context = object_of(fields.get("context") or {}, "context")
    if unknown := [name for name in context if name != "system"]:
        raise RowError(f"context.{unknown[0]}", "is unknown; only system can be used")
    return optional(context, "system")


def _strings(fields: dict[str, Any], name: str) -> list[str]:
    """A field that is one text or a list of texts."""
    if not isinstance(fields.get(name), list):
        return [required(fields, name)]
    texts = [text_of(text, f"{name}[{index}]") for index, text in enumerate(fields[name])]
    if not texts:
        raise RowError(name, "is empty")
    return texts


def xtuner(fields: dict[str, Any]) -> Example:
    """conversation: a list of {input, output}; system in the first; output_with_loss."""
    given = items_of(fields, "conversation", "{input, output}")
    if not given:
        raise RowError("conversation", "is empty")
    turns: list[Message] = []
    for index, turn in enumerate(given):
        where = f"conversation[{index}]"
        turn = object_of(turn, where)
        if not index and (system := optional(turn, "system")):
            turns.append(Message("system", system))
        mark = turn.get("output_with_loss")
        trained = True if mark is None else label_of(mark, f"{where}.output_with_loss")
        turns.append(Message("user", text_of(turn.get("input"), f"{where}.input")))
        answer = text_of(turn.get("output"), f"{where}.output")
        turns.append(Message("assistant", answer, trained=trained))
    if len(turns) == 2 and not turns[0].content:  # XTuner's way to write a text for pretraining
        return Example((turns[1],), raw=True)
    return Example(tuple(turns))


def prompt_completion(fields: dict[str, Any]) -> Example:
    """prompt, completion: two texts, joined without a chat template, or two lists of messages."""
    if isinstance(fields.get("completion"), str):
        prompt = Message("user", required(fields, "prompt"))
        return Example((prompt, Message("assistant", required(fields, "completion"))), raw=True)
    prompt, completion = (
        items_of(fields, name, "{role, content}") for name in ("prompt", "completion")
    )
    turns = messages_of([*prompt, *completion], "prompt + completion")
    context = (turn._replace(trained=False) for turn in turns[: len(prompt)])
    return Example((*context, *turns[len(prompt) :]), tools=tools_of(fields))


def text(fields: dict[str, Any]) -> Example:
    """text: learnt as a whole."""
    return Example((Message("assistant", content_of(fields.get("text"), "text")),), raw=True)


def document(fields: dict[str, Any]) -> Example:
    """A title and paragraphs, also nested in sections: learnt as a whole, a line each."""
    return Example((Message("assistant", "\n".join(_lines(fields, ""))),), raw=True)


def _lines(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        titles = (optional(value, name) for name in TITLES)
        yield from (title for title in titles if title)
        name = first_of(value, TEXTS)
        yield from _lines(value.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _lines(part, f"{where}[{index}]")
    else:
        yield text_of(value, where)
