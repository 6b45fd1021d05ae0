"""Conversations and texts -> token ids and the mask of what is learnt.

A conversation is rendered to text by the chat template and the whole text is tokenized in one pass,
exactly as `apply_chat_template` does, so training sees the ids that serving produces. What is
learnt is found in the text (see masks.py) and carried over to tokens through character offsets.
Raw examples are the texts of their messages, each answer followed by EOS, behind BOS where the
tokenizer puts it.

Text in a message that looks like a special token stays text: it is wrapped in markers before the
rendering and encoded as plain text after it.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.batch import TokenRow
from jaxtune.data.examples import Example, Message
from jaxtune.data.masks import (
    WRAP_END,
    WRAP_START,
    WRAPS,
    Rendering,
    Style,
    Turn,
    render_rows,
    token_mask,
    wrap,
)
from jaxtune.data.rendering import Span, compile_template, take_markers
from jaxtune.data.rows import RowError
from jaxtune.data.templates import TEMPLATES
from jaxtune.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOOLS_HINT = "tools need a template that prints them, as data.template=qwen2.5"
PROBE = Example(
    (
        Message("user", "What is one and one?"),
        Message("assistant", "Two."),
        Message("user", "And two and two?"),
        Message("assistant", "Four."),
    ),
    "start-up probe",
)


@dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer with its chat template; make it with `chat_of`."""

    tokenizer: "PreTrainedTokenizerFast"
    template: str | None
    style: Style
    special_ids: dict[str, int]
    bos: str

    @functools.cached_property
    def plain(self) -> "Tokenizer":
        """A copy of the backend that reads special tokens as ordinary text."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def render(
        self,
        messages: Sequence[Message],
        prompt: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ) -> tuple[str, list[Span]]:
        """Renders messages; returns the text and the spans that the template marks.

        Raises:
            RowError: the template refuses the conversation.
            ConfigError: there is no template.
        """
        if self.template is None:
            raise ConfigError(
                "the tokenizer has no chat template - set data.template to one of "
                f"{', '.join(TEMPLATES)}, or to none (texts are joined as they are)"
            )
        try:
            text = compile_template(self.template)(
                messages=[message.for_template() for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
            return take_markers(text)
        except Exception as error:  # whatever a foreign program provokes is the row's problem
            has_tools = any(message.tool_calls for message in messages)
            hint = f" ({TOOLS_HINT})" if has_tools else ""
            raise RowError("", f"the chat template refuses it: {error}{hint}") from error

    def rows(self, example: Example, last_only: bool) -> list[Rendering]:
        """The texts of an example (see `masks.render_rows`) and what is learnt in them.

        Raises:
            RowError: the template drops text, refuses the conversation or marks nothing.
            ConfigError: the example needs a template and there is none.
        """
        messages = tuple(wrap(message, self.style.special) for message in example.messages)
        if example.raw:
            return [self._raw(messages, last_only)]
        tools = wrap(example.tools, self.style.special)
        render = functools.partial(self.render, tools=tools)
        rows = render_rows(messages, render, self.style, last_only)
        for tool in tools:
            if not all(tool["function"]["name"] in row.text for row in rows):
                raise RowError("tools", f"the chat template drops them ({TOOLS_HINT})")
        return rows

    def _raw(self, messages: Sequence[Message], last_only: bool) -> Rendering:
        """The texts of the messages, each answer closed by EOS."""
        text, learnt, excluded = self.bos, [], []
        for index, message in enumerate(messages):
            start = len(text)
            text += message.content
            if message.role == "assistant":
                text += self.style.eos
                is_wanted = message.trained and (index + 1 == len(messages) or not last_only)
                (learnt if is_wanted else excluded).append((start, len(text)))
        return Rendering(text, learnt, excluded)

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids [T] and character offsets [T, 2] of each text."""
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            self._encode_wrapped(text)
            if WRAP_START in text
            else (np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2))
            for text, ids, offsets in zip(
                texts, batch["input_ids"], batch["offset_mapping"], strict=True
            )
        ]

    def _encode_wrapped(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encodes text whose wrapped special tokens are plain text, unlike the others."""
        special = self.style.special.pattern
        pieces = re.split(f"({WRAP_START}(?:{special}){WRAP_END}|{special})", text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        characters: list[str] = []
        places: list[int] = []  # of each character, in `text`
        place = 0
        for index, piece in enumerate([*pieces, ""]):
            is_end = index == len(pieces)
            is_special = not is_end and index % 2 == 1 and not piece.startswith(WRAP_START)
            if characters and (is_special or is_end):
                plain = self.plain.encode("".join(characters), add_special_tokens=False)
                places.append(place)
                ids += plain.ids
                offsets += [(places[s], places[max(e - 1, s)] + (e > s)) for s, e in plain.offsets]
                characters, places = [], []
            if is_special:
                ids.append(self.special_ids[piece])
                offsets.append((place, place + len(piece)))
            else:
                kept = [(c, at) for at, c in enumerate(piece, place) if c not in WRAPS]
                characters += [c for c, _ in kept]
                places += [at for _, at in kept]
            place += len(piece)
        return np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)

    def is_ended(self, row: TokenRow) -> bool:
        """Whether the last learnt token is one that ends an answer (or there is none)."""
        learnt = row.tokens[row.trained]
        return not len(learnt) or int(learnt[-1]) in self.special_ids.values()


def chat_of(tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """The tokenizer with its chat template, if it has one, checked on a probe conversation.

    Raises:
        ConfigError: the template fails, takes too long, or drops text.
    """
    if tokenizer.chat_template is None:
        return _chat(tokenizer, None)
    return _checked_chat(tokenizer, tokenizer.get_chat_template())


def _chat(tokenizer: "PreTrainedTokenizerFast", template: str | None) -> Chat:
    added = tokenizer.added_tokens_decoder.items()
    special_ids = {token.content: index for index, token in added if token.special}
    longest_first = sorted(special_ids, key=len, reverse=True)
    markers = template and re.search(r"\{%-?\s*generation\s*-?%\}", template)
    bos: Any = tokenizer.bos_token
    style = Style(
        special=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        has_markers=bool(markers),
        turn=None,
        eos=str(tokenizer.eos_token or ""),
    )
    starts_with_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return Chat(
        tokenizer, template, style, special_ids, str(bos) if bos and starts_with_bos else ""
    )


@functools.lru_cache(maxsize=8)
def _checked_chat(tokenizer: "PreTrainedTokenizerFast", template: str) -> Chat:
    chat = _chat(tokenizer, template)
    rows = rows_of(chat, [PROBE], "answers")[0]
    if isinstance(rows, RowError):
        raise ConfigError(
            f"the tokenizer's chat template cannot be used: {rows.reason} - "
            f"set data.template to one of {', '.join(TEMPLATES)}"
        )
    return replace(chat, style=chat.style._replace(turn=_turn_of(chat)))


def _turn_of(chat: Chat) -> Turn | None:
    """What the template prints before and after every answer, if both hold special tokens."""
    rows = chat.rows(PROBE, last_only=False)
    if chat.style.has_markers or len(rows) > 1:
        return None
    turns = set()
    for index, (start, end) in zip((1, 3), rows[0].spans, strict=True):
        before = chat.render(PROBE.messages[:index])[0]
        answer = rows[0].text[start:end].partition(PROBE.messages[index].content)
        if not rows[0].text.startswith(before) or answer[0]:
            return None
        turns.add(Turn(rows[0].text[len(before) : start], answer[2]))
    turn = turns.pop()
    return turn if not turns and all(map(chat.style.special.search, turn)) else None


def rows_of(
    chat: Chat, examples: Sequence[Example], train_on: str
) -> list[list[TokenRow] | RowError]:
    """Tokenizes examples in one batch.

    Args:
        chat: tokenizer and template.
        examples: conversations or texts.
        train_on: "answers", "last" (the last answer only), or "all" for every token but the first.

    Returns:
        For each example its rows (more than one only if the template rewrites earlier turns), or
        what is wrong with it.
    """
    rendered: list[list[Rendering] | RowError] = []
    for example in examples:
        try:
            rendered.append(chat.rows(example, last_only=train_on == "last"))
        except RowError as error:
            rendered.append(error)
    texts = [r.text for rows in rendered if not isinstance(rows, RowError) for r in rows]
    encoded = iter(chat.encode(texts))
    result: list[list[TokenRow] | RowError] = []
    for rows in rendered:
        if isinstance(rows, RowError):
            result.append(rows)
            continue
        made = [(next(encoded), rendering) for rendering in rows]
        if any(_doubles_bos(chat.tokenizer, ids) for (ids, _), _ in made):
            result.append(RowError("", "the chat template prints BOS twice"))
            continue
        learn_all = train_on == "all"
        result.append(
            [TokenRow(ids, token_mask(offsets, row, learn_all)) for (ids, offsets), row in made]
        )
    return result


def _doubles_bos(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray) -> bool:
    return len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id


def prompt_ids(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] = (),
    raw: bool = False,
) -> np.ndarray:
    """Token ids [T] (int32) of a conversation that waits for the assistant's next answer.

    Args:
        tokenizer: with a chat template, unless `raw`.
        messages: the conversation so far.
        tools: descriptions of the tools that may be called.
        raw: join the texts as they are.

    Raises:
        ConfigError: the tokenizer has no usable chat template, or it refuses the conversation.
    """
    chat = chat_of(tokenizer)
    given = [wrap(message, chat.style.special) for message in messages]
    if raw:
        return chat.encode([chat.bos + "".join(message.content for message in given)])[0][0]
    try:
        text, _ = chat.render(given, prompt=True, tools=wrap(tools, chat.style.special))
    except RowError as error:
        raise ConfigError(f"{error.reason} - change the messages or set data.template") from error
    return chat.encode([text])[0][0]


def stop_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and what the chat template puts after an answer.

    After the last answer a template may print less than between turns, as GLM-4's does, so every
    learnt stretch of the probe counts.
    """
    eos: Any = tokenizer.eos_token_id
    stops = [] if eos is None else [int(eos)]
    if tokenizer.chat_template is not None:
        chat = chat_of(tokenizer)
        rows = rows_of(chat, [PROBE], "answers")[0]
        assert not isinstance(rows, RowError)  # chat_of has just rendered it
        for row in rows:
            is_last = row.trained & ~np.append(row.trained[1:], False)
            stops += [i for i in row.tokens[is_last].tolist() if i in chat.special_ids.values()]
    return tuple(dict.fromkeys(stops))
