"""Which characters of a rendered conversation are learnt, and which tokens those are.

* A template with `{% generation %}` markers says it itself.
* Otherwise answer i is what `render(messages[:i + 1])` adds to `render(messages[:i])` with the
  generation prompt: exactly what the model has to write at that point. White space after the
  end-of-turn token is not learnt.
* Where every answer is opened and closed by the same texts (`Turn`, found once for a template), the
  k-th opening is where the k-th answer begins, and one rendering of the row is enough.
* A template that rewrites earlier turns (drops past reasoning, closes only the last turn) breaks
  the second rule. Each answer then becomes a row of its own, which is also how it is generated.
* An answer that ends without a special token ends with the one that follows it (GLM's next role),
  the last answer of a row with EOS.

Every rule is checked on every row: a rendering that does not begin with its own prompt, or that
lacks a message's text, is an error of that row and never a silently wrong mask.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtune.data.examples import Message
from jaxtune.data.rendering import MARKERS, Span
from jaxtune.data.rows import RowError

# Unicode noncharacters: never part of text, so they can wrap literal special tokens.
WRAP_START, WRAP_END = "\ufdd0", "\ufdd1"
WRAPS = (WRAP_START, WRAP_END)
_RESERVED = re.compile(f"[{WRAP_START}{WRAP_END}]|{MARKERS.pattern}")


class Render(Protocol):
    """Renders messages to text and the spans that the template marks."""

    def __call__(
        self, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[Span]]: ...


class Rendering(NamedTuple):
    """Text of one row, and the spans of characters in it that are learnt or that never are."""

    text: str
    spans: list[Span]
    excluded: list[Span]


class Turn(NamedTuple):
    """What a template prints before and after every answer; both hold a special token."""

    opening: str
    closing: str


class Style(NamedTuple):
    """How answers show in a template's text.

    Attributes:
        special: matches any special token.
        has_markers: whether the template has `{% generation %}` markers.
        turn: what surrounds every answer, where it is always the same.
        eos: closes a last answer that the template leaves open; empty: the tokenizer has none.
    """

    special: re.Pattern[str]
    has_markers: bool
    turn: Turn | None
    eos: str


def wrap(value: Any, special: re.Pattern[str]) -> Any:
    """Wraps every special token in the texts of a message or of JSON, so that it can stay text."""
    if isinstance(value, str):
        bare = _RESERVED.sub("", value)
        return special.sub(f"{WRAP_START}\\g<0>{WRAP_END}", bare)
    if isinstance(value, Message):
        return Message(value.role, *(wrap(field, special) for field in value[1:]))
    if isinstance(value, dict):
        return {key: wrap(item, special) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(wrap(item, special) for item in value)
    return value


def render_rows(
    messages: Sequence[Message], render: Render, style: Style, last_only: bool = False
) -> list[Rendering]:
    """Renders one conversation and finds what is learnt in it.

    Args:
        messages: the conversation; its last message is the assistant's.
        render: the chat template.
        style: how answers show in its text.
        last_only: learn the last answer only.

    Raises:
        RowError: the template drops or changes text, or marks nothing.
    """
    text, marked = render(messages)
    _check_texts(messages, text)
    last = len(messages) - 1
    wanted = [
        message.trained and (index == last or not last_only)
        for index, message in enumerate(messages)
        if message.role == "assistant"
    ]
    if style.has_markers:
        return [_marked(text, marked, wanted, style.special)]
    spans = _between_turns(messages, text, style.turn) if style.turn else None
    if spans is None:
        spans = _added(messages, text, render, style.eos)
    if spans is None:
        return _one_row_an_answer(messages, render, style, wanted)
    return [_chosen(*_closed(text, spans, style), wanted)]


def _chosen(text: str, spans: Sequence[Span], wanted: Sequence[bool]) -> Rendering:
    learnt = [span for span, is_wanted in zip(spans, wanted, strict=True) if is_wanted]
    return Rendering(text, learnt, [span for span in spans if span not in learnt])


def _marked(
    text: str, marked: list[Span], wanted: Sequence[bool], special: re.Pattern[str]
) -> Rendering:
    """The spans that the template marks itself, as far as they are wanted."""
    if not marked:
        raise RowError("", "the chat template marks nothing to learn")
    spans = [_through_special(text, span, special) for span in marked]
    if all(wanted):
        return Rendering(text, spans, [])
    if len(spans) != len(wanted):
        reason = f"the chat template marks {len(spans)} spans for {len(wanted)} answers"
        raise RowError("", f"{reason}, so none can be left out")
    return _chosen(text, spans, wanted)


def _between_turns(messages: Sequence[Message], text: str, turn: Turn) -> list[Span] | None:
    """The spans of the answers where each is opened and closed as usual; None where one is not."""
    answers = [message for message in messages if message.role == "assistant"]
    if text.count(turn.opening) != len(answers):
        return None
    spans, place = [], 0
    for answer in answers:
        start = text.index(turn.opening, place) + len(turn.opening)
        ends = (content + turn.closing for content in (answer.content, answer.content.strip()))
        end = next((end for end in ends if text.startswith(end, start)), None)
        if end is None or answer.tool_calls or answer.reasoning:
            return None
        place = start + len(end)
        spans.append((start, place))
    return spans


def _added(messages: Sequence[Message], text: str, render: Render, eos: str) -> list[Span] | None:
    """What each answer adds to its prompt; None where the template rewrites earlier turns."""
    spans = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            is_last = index + 1 == len(messages)
            through = text if is_last else render(messages[: index + 1])[0]
            if not text.startswith(through):
                through = through.removesuffix(eos)  # Phi 3 prints it behind the whole conversation
            prompt = render(messages[:index], prompt=True)[0]
            if not (text.startswith(through) and through.startswith(prompt)):
                return None
            spans.append(_answer(prompt, through, index, message))
    return spans


def _one_row_an_answer(
    messages: Sequence[Message], render: Render, style: Style, wanted: Sequence[bool]
) -> list[Rendering]:
    rows = []
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    for index, is_wanted in zip(answers, wanted, strict=True):
        if is_wanted:
            prompt = render(messages[:index], prompt=True)[0]
            text = render(messages[: index + 1])[0]
            if not text.startswith(prompt):
                raise RowError(
                    f"messages[{index}]",
                    "the chat template renders the prompt differently once it is answered",
                )
            span = _answer(prompt, text, index, messages[index])
            text, spans = _closed(text, [span], style)
            rows.append(Rendering(text, spans, []))
    return rows


def _answer(prompt: str, through: str, index: int, message: Message) -> Span:
    """The span that an answer adds to its prompt."""
    added = through[len(prompt) :].rstrip()
    for field in ("content", "reasoning"):
        if getattr(message, field).strip() not in added:
            where = f"messages[{index}].{field}"
            raise RowError(where, "the chat template drops or changes it")
    for call in message.tool_calls:
        if call["function"]["name"] not in added:
            raise RowError(f"messages[{index}].tool_calls", "the chat template drops them")
    return len(prompt), len(prompt) + len(added)


def _check_texts(messages: Sequence[Message], text: str) -> None:
    """Checks that all text but the answers occurs, in order; `_answer` checks the answers.

    A system text may stand anywhere: some templates put it into the last question.
    """
    place = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            is_system = message.role == "system"
            found = text.find(message.content.strip(), 0 if is_system else place)
            if found < 0:
                where = f"messages[{index}].content"
                raise RowError(where, f"the chat template drops or changes the {message.role} text")
            place = place if is_system else found


def _closed(text: str, spans: Sequence[Span], style: Style) -> tuple[str, list[Span]]:
    """Each span with the special token that ends it; EOS is added where the last one has none."""
    ended = [_through_special(text, span, style.special) for span in spans]
    start, end = ended[-1]
    if style.eos and not _ends_special(text[start:end], style.special) and not text[end:].strip():
        text = text[:end] + style.eos
        ended[-1] = (start, len(text))
    return text, ended


def _ends_special(text: str, special: re.Pattern[str]) -> bool:
    return re.search(f"(?:{special.pattern})$", text.rstrip()) is not None


def _through_special(text: str, span: Span, special: re.Pattern[str]) -> Span:
    """Extends a span over the special token right behind it, if it does not end in one."""
    start, end = span
    if _ends_special(text[start:end], special):
        return span
    behind = special.match(text, end)
    return start, behind.end() if behind else end


def token_mask(offsets: np.ndarray, row: Rendering, learn_all: bool) -> np.ndarray:
    """Marks the tokens that touch a span that is learnt.

    Args:
        offsets: int [T, 2], first and last + 1 character of each token. Tokenizers that trim
            offsets give white space an empty range at its end.
        row: the spans of characters.
        learn_all: mark every token but the first and those of excluded spans.

    Returns:
        bool [T].
    """
    mask = np.full(len(offsets), learn_all)
    for span in row.excluded if learn_all else ():
        mask &= ~_touches(offsets, span)
    for span in row.spans:
        mask |= _touches(offsets, span)
    mask[:1] = False
    return mask


def _touches(offsets: np.ndarray, span: Span) -> np.ndarray:
    (start, end), first, last = span, offsets[:, 0], offsets[:, 1]
    is_blank = first == last
    return ((first < end) & (last > start)) | (is_blank & (first > start) & (first <= end))
