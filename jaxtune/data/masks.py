"""Which characters of a rendered conversation are learnt, and which tokens those are.

* A template with `{% generation %}` markers says it itself.
* Otherwise answer i is what `render(messages[:i + 1])` adds to `render(messages[:i])` with the
  generation prompt: exactly what the model has to write at that point. White space after the
  end-of-turn token is not learnt.
* A template that rewrites earlier turns (drops past reasoning, closes only the last turn) breaks
  the second rule. Each answer then becomes a row of its own, which is also how it is generated.

Every rule is checked on every row: a rendering that does not begin with its own prompt, or that
lacks a message's text, is an error of that row and never a silently wrong mask.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxtune.data.formats import Message
from jaxtune.data.sources import RowError

# Unicode noncharacters: never part of text, so they can wrap literal special tokens.
WRAP_START, WRAP_END = "\ufdd0", "\ufdd1"
WRAPS = (WRAP_START, WRAP_END)

Span = tuple[int, int]


class Render(Protocol):
    """Renders messages to text and the spans that the template marks."""

    def __call__(
        self, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[Span]]: ...


class Rendering(NamedTuple):
    """Text of one row, and the spans of characters in it that are learnt."""

    text: str
    spans: list[Span]


def wrap(messages: Sequence[Message], special: re.Pattern[str]) -> tuple[Message, ...]:
    """Wraps every special token that occurs in a message's text, so that it can stay text."""

    def one(content: str) -> str:
        if not special.search(content):
            return content
        bare = content.replace(WRAP_START, "").replace(WRAP_END, "")
        return special.sub(f"{WRAP_START}\\g<0>{WRAP_END}", bare)

    return tuple(Message(role, one(content)) for role, content in messages)


def render_rows(
    messages: Sequence[Message], render: Render, special: re.Pattern[str], has_markers: bool
) -> list[Rendering]:
    """Renders one conversation and finds what is learnt in it.

    Args:
        messages: the conversation; its last message is the assistant's.
        render: the chat template.
        special: matches any special token.
        has_markers: whether the template has `{% generation %}` markers.

    Raises:
        RowError: the template drops or changes text, or marks nothing.
    """
    text, marked = render(messages)
    _check_texts(messages, text)
    if has_markers:
        if not marked:
            raise RowError("", "the chat template marks nothing to learn")
        return [Rendering(text, [_through_end_of_turn(text, span, special) for span in marked])]
    spans = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            is_last = index + 1 == len(messages)
            through = text if is_last else render(messages[: index + 1])[0]
            prompt = render(messages[:index], prompt=True)[0]
            if not (text.startswith(through) and through.startswith(prompt)):
                return _one_row_an_answer(messages, render)
            spans.append(_answer(prompt, through, index, message))
    return [Rendering(text, spans)]


def _one_row_an_answer(messages: Sequence[Message], render: Render) -> list[Rendering]:
    rows = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            prompt = render(messages[:index], prompt=True)[0]
            text = render(messages[: index + 1])[0]
            if not text.startswith(prompt):
                raise RowError(
                    f"messages[{index}]",
                    "the chat template renders the prompt differently once it is answered",
                )
            rows.append(Rendering(text, [_answer(prompt, text, index, message)]))
    return rows


def _answer(prompt: str, through: str, index: int, message: Message) -> Span:
    """The span that an answer adds to its prompt."""
    added = through[len(prompt) :].rstrip()
    if message.content.strip() not in added:
        raise RowError(f"messages[{index}].content", "the chat template drops or changes it")
    return len(prompt), len(prompt) + len(added)


def _check_texts(messages: Sequence[Message], text: str) -> None:
    """Checks that all text but the answers occurs, in order; `_answer` checks the answers."""
    place = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            found = text.find(message.content.strip(), place)
            if found < 0:
                where = f"messages[{index}].content"
                raise RowError(where, f"the chat template drops or changes the {message.role} text")
            place = found


def _through_end_of_turn(text: str, span: Span, special: re.Pattern[str]) -> Span:
    """Extends a marked span over the special token right behind it, if it does not end in one."""
    start, end = span
    if re.search(f"(?:{special.pattern})$", text[start:end].rstrip()):
        return span
    behind = special.match(text, end)
    return start, behind.end() if behind else end


def token_mask(offsets: np.ndarray, spans: Sequence[Span], train_on: str) -> np.ndarray:
    """Marks the tokens that touch a span.

    Args:
        offsets: int [T, 2], first and last + 1 character of each token. Tokenizers that trim
            offsets give white space an empty range at its end.
        spans: character ranges that are learnt.
        train_on: "answers", or "all" for every token but the first.

    Returns:
        bool [T].
    """
    first, last = offsets[:, 0], offsets[:, 1]
    mask = np.full(len(offsets), train_on == "all")
    for start, end in spans:
        touches = (first < end) & (last > start)
        mask |= touches | ((first == last) & (first > start) & (first <= end))
    mask[:1] = False
    return mask
