"""Conversations -> token ids and the mask of what is learnt; the one file that uses transformers.

A conversation is rendered to text by the chat template and the whole text is tokenized in one pass,
exactly as `apply_chat_template` does, so training sees the ids that serving produces. What is
learnt is found in the text (see masks.py) and carried over to tokens through character offsets.

Text in a message that looks like a special token stays text: it is wrapped in markers before the
rendering and encoded as plain text after it.
"""

import functools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data import gguf_tokenizer
from jaxtune.data.batch import TokenRow
from jaxtune.data.formats import Example, Message
from jaxtune.data.masks import WRAP_END, WRAP_START, WRAPS, render_rows, token_mask, wrap
from jaxtune.data.sources import RowError
from jaxtune.data.templates import CHATML, TEMPLATES
from jaxtune.errors import ConfigError, WeightError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Tokenizers need no torch; without this transformers advises to install it at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

PROBE_SECONDS = 5.0
PROBE = Example(
    (
        Message("user", "What is one and one?"),
        Message("assistant", "Two."),
        Message("user", "And two and two?"),
        Message("assistant", "Four."),
    ),
    "start-up probe",
)


def load_tokenizer(path: str, *, template: str | None = None) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a folder, a .gguf file or a hub id; `tiny:...` gives a byte tokenizer.

    Args:
        path: where the tokenizer is.
        template: name of a built-in chat template that replaces the tokenizer's own.

    Raises:
        ConfigError: the template is unknown, or needs tokens that the tokenizer lacks.
        WeightError: there is no tokenizer that can be loaded without running foreign code.
    """
    if path.startswith("tiny:"):
        tokenizer = _byte_tokenizer()
    elif Path(path).expanduser().is_file():
        tokenizer = _from_gguf(Path(path).expanduser())
    else:
        tokenizer = _from_pretrained(path)
    if template is not None:
        tokenizer.chat_template = _built_in(tokenizer, template)
    return tokenizer


def _from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    loaded = gguf_tokenizer.load(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend,
        clean_up_tokenization_spaces=False,
        model_max_length=loaded.context_length,
        **loaded.special_tokens,
    )
    tokenizer.chat_template = loaded.chat_template
    return tokenizer


def _from_pretrained(path: str) -> "PreTrainedTokenizerFast":
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    try:
        # tokenizer.json says everything; AutoTokenizer imports models (and torch, where it is
        # installed) only to find a class for it, so it is left to folders without that file.
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        tokenizer: Any = Loader.from_pretrained(
            str(folder) if is_folder else path,
            revision="main",
            trust_remote_code=False,
            local_files_only=is_folder,
        )
    except Exception as error:  # transformers raises nearly every type, for the same few reasons
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightError(
            f"no tokenizer can be loaded from {path}: {reason} - set model.tokenizer to a folder "
            "with tokenizer.json, a .gguf file or a hub id"
        ) from error
    if not tokenizer.is_fast:
        raise WeightError(
            f"the tokenizer of {path} has no tokenizer.json - save it once as a fast tokenizer"
        )
    return tokenizer


def _byte_tokenizer() -> "PreTrainedTokenizerFast":
    """259 tokens: three special ones and the 256 bytes; chatml. For tests and tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[2], pad_token=special[0]
    )
    tokenizer.chat_template = CHATML.jinja
    return tokenizer


def _built_in(tokenizer: "PreTrainedTokenizerFast", name: str) -> str:
    """The text of a built-in template, made to fit the tokenizer."""
    if name not in TEMPLATES:
        raise ConfigError(
            f"data.template={name!r} is not built in - choose one of {', '.join(TEMPLATES)}"
        )
    jinja, tokens = TEMPLATES[name]
    if not tokens and tokenizer.eos_token is None:
        raise ConfigError(f"data.template={name} ends answers with EOS, which the tokenizer lacks")
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        fitting = [n for n, row in TEMPLATES.items() if all(t in vocabulary for t in row.tokens)]
        raise ConfigError(
            f"data.template={name} needs the tokens {', '.join(missing)}, which the tokenizer "
            f"lacks - templates that fit: {', '.join(fitting)}"
        )
    plain = tokenizer("").input_ids
    starts_with_bos = tokenizer.bos_token_id is not None and plain[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + jinja


@dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer with its chat template; make it with `chat_of`."""

    tokenizer: "PreTrainedTokenizerFast"
    template: str
    special: re.Pattern[str]
    special_ids: dict[str, int]
    has_markers: bool
    variables: dict[str, Any]

    @functools.cached_property
    def plain(self) -> "Tokenizer":
        """A copy of the backend that reads special tokens as ordinary text."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def render(
        self, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders messages; returns the text and the spans that the template marks.

        Raises:
            RowError: the template refuses the conversation.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Its annotations promise one text; it returns lists of texts and of spans.
            rendered: Any = render_jinja_template(
                conversations=[[m._asdict() for m in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_markers,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError, MemoryError) as error:
            raise RowError("", f"the chat template refuses it: {error}") from error
        texts, spans = rendered
        return texts[0], spans[0] if self.has_markers else []

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
        special = self.special.pattern
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
        """Whether the last learnt token is one that ends an answer."""
        return int(row.tokens[row.trained][-1]) in self.special_ids.values()


def chat_of(tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """The tokenizer's chat template, checked on a probe conversation.

    Raises:
        ConfigError: there is no template, or it fails, takes too long, or drops text.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer has no chat template - set data.template to one of "
            f"{', '.join(TEMPLATES)}"
        )
    return _checked_chat(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=8)
def _checked_chat(tokenizer: "PreTrainedTokenizerFast", template: str) -> Chat:
    added = tokenizer.added_tokens_decoder.items()
    special_ids = {token.content: index for index, token in added if token.special}
    longest_first = sorted(special_ids, key=len, reverse=True)
    chat = Chat(
        tokenizer=tokenizer,
        template=template,
        special=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        special_ids=special_ids,
        has_markers=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
        variables=dict(tokenizer.special_tokens_map),
    )
    outcome: list[Any] = []

    def probe() -> None:
        try:
            outcome.append(rows_of(chat, [PROBE], "answers")[0])
        except Exception as error:  # whatever a foreign template provokes is reported below
            outcome.append(error)

    # A thread can be given up on; a template that never ends cannot be stopped otherwise.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    problem = outcome[0] if outcome else f"takes more than {PROBE_SECONDS:.0f} s"
    if not isinstance(problem, list):
        raise ConfigError(
            f"the tokenizer's chat template cannot be used: {problem} - "
            f"set data.template to one of {', '.join(TEMPLATES)}"
        )
    return chat


def rows_of(
    chat: Chat, examples: Sequence[Example], train_on: str
) -> list[list[TokenRow] | RowError]:
    """Tokenizes examples in one batch.

    Args:
        chat: tokenizer and template.
        examples: conversations.
        train_on: "answers", or "all" for every token but the first.

    Returns:
        For each example its rows (more than one only if the template rewrites earlier turns), or
        what is wrong with it.
    """
    rendered: list[Any] = []
    for example in examples:
        try:
            messages = wrap(example.messages, chat.special)
            rendered.append(render_rows(messages, chat.render, chat.special, chat.has_markers))
        except RowError as error:
            rendered.append(error)
    texts = [r.text for rows in rendered if not isinstance(rows, RowError) for r in rows]
    encoded = iter(chat.encode(texts))
    result: list[list[TokenRow] | RowError] = []
    for rows in rendered:
        if isinstance(rows, RowError):
            result.append(rows)
            continue
        made = [(next(encoded), rendering.spans) for rendering in rows]
        if any(_doubles_bos(chat.tokenizer, ids) for (ids, _), _ in made):
            result.append(RowError("", "the chat template prints BOS twice"))
            continue
        result.append(
            [TokenRow(ids, token_mask(offsets, spans, train_on)) for (ids, offsets), spans in made]
        )
    return result


def _doubles_bos(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray) -> bool:
    return len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> np.ndarray:
    """Token ids [T] (int32) of a conversation that waits for the assistant's next answer.

    Raises:
        ConfigError: the tokenizer has no usable chat template, or it refuses the conversation.
    """
    chat = chat_of(tokenizer)
    try:
        text, _ = chat.render(wrap(messages, chat.special), prompt=True)
    except RowError as error:
        raise ConfigError(f"{error.reason} - change the messages or set data.template") from error
    return chat.encode([text])[0][0]


def split_answer(example: Example) -> tuple[tuple[Message, ...], str]:
    """The messages before the last answer, and that answer."""
    return example.messages[:-1], example.messages[-1].content


def stop_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and what the chat template puts after an answer."""
    eos: Any = tokenizer.eos_token_id
    stops = [] if eos is None else [int(eos)]
    if tokenizer.chat_template is not None:
        chat = chat_of(tokenizer)
        rows = rows_of(chat, [PROBE], "answers")[0]
        assert not isinstance(rows, RowError)  # chat_of has just rendered it
        last = int(rows[-1].tokens[rows[-1].trained][-1])
        if chat.is_ended(rows[-1]) and last not in stops:
            stops.append(last)
    return tuple(stops)
