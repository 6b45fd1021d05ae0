"""What becomes of rows that are longer than `max_seq_len` (data.overlong).

`last_rounds` and `truncate_source` are PaddleNLP's rules for conversations and for src and tgt
(run_finetune: src_length, max_length); ids and masks are those of the shortened conversation.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxtune.data.batch import TokenRow
from jaxtune.data.examples import Example, Message
from jaxtune.data.rows import RowError
from jaxtune.data.tokenize import Chat, rows_of
from jaxtune.schema import Data


def fit(
    example: Example, rows: Sequence[TokenRow], chat: Chat, cfg: Data, count: dict[str, int]
) -> list[TokenRow]:
    """The rows of an example that fit, and what the policy makes of the others.

    Args:
        example: what the rows say.
        rows: its rows, of any length.
        chat: tokenizer and template.
        cfg: the data section of the config.
        count: grows by what was truncated, dropped or split.
    """
    limit = cfg.max_seq_len
    if cfg.overlong == "truncate_source" and not cfg.cuts_examples:
        return [_source_cut(row, cfg, count) for row in rows]
    if cfg.cuts_examples or all(len(row.tokens) <= limit for row in rows):
        return list(rows)
    if cfg.overlong == "last_rounds":
        if len(rows) == 1:
            return [_last_rounds(example, cfg.train_on, chat, cfg, count)]
        answers = [i for i, m in enumerate(example.messages) if m.role == "assistant" and m.trained]
        parts = [replace(example, messages=example.messages[: i + 1]) for i in answers]
        pairs = zip(rows, parts[-len(rows) :], strict=True)
        return [
            row if len(row.tokens) <= limit else _last_rounds(part, "last", chat, cfg, count)
            for row, part in pairs
        ]
    return [part for row in rows for part in _cut(row, cfg, count)]


def _cut(row: TokenRow, cfg: Data, count: dict[str, int]) -> list[TokenRow]:
    """Applies a policy that looks at tokens only."""
    limit = cfg.max_seq_len
    if len(row.tokens) <= limit:
        return [row]
    if cfg.overlong in ("drop", "error"):
        count["dropped"] += 1
        return []
    if cfg.overlong == "split":
        places = range(0, len(row.tokens), limit)
        count["split"] += len(places) - 1
        return [_part(row, start, start + limit) for start in places]
    count["truncated"] += 1
    if cfg.overlong == "truncate_left":
        return [_part(row, len(row.tokens) - limit, len(row.tokens))]
    return [_part(row, 0, limit)]


def _part(row: TokenRow, start: int, stop: int) -> TokenRow:
    """Some tokens of a row; the first is no target, since its context is gone."""
    trained = row.trained[start:stop].copy()
    trained[:1] = False
    return TokenRow(row.tokens[start:stop], trained)


def _source_cut(row: TokenRow, cfg: Data, count: dict[str, int]) -> TokenRow:
    """Keeps the end of what stands before the first learnt token, and the beginning of the rest."""
    length = int(row.trained.argmax()) if row.trained.any() else len(row.tokens)
    kept = min(length, cfg.source_limit)
    if kept == length and len(row.tokens) <= cfg.max_seq_len:
        return row
    count["truncated"] += 1
    start = length - kept
    return _part(row, start, start + cfg.max_seq_len)


def _last_rounds(
    example: Example, train_on: str, chat: Chat, cfg: Data, count: dict[str, int]
) -> TokenRow:
    """The last whole rounds that fit, behind the system text; or the last one, cut.

    If not even the last round fits, its question keeps its last `source_limit` tokens, and what
    is still too long is cut on the right.
    """
    count["truncated"] += 1
    first = 1 if example.messages[0].role == "system" else 0
    system, turns = example.messages[:first], example.messages[first:]
    starts = [index for index, message in enumerate(turns) if message.role == "user"]
    for start in starts[1:]:
        row = _only_row(replace(example, messages=system + turns[start:]), train_on, chat)
        if len(row.tokens) <= cfg.max_seq_len:
            return row
    last = turns[starts[-1] :] if starts else turns
    if starts:
        last = (_shortened(last[0], cfg.source_limit, chat), *last[1:])
    row = _only_row(replace(example, messages=system + last), train_on, chat)
    return _part(row, 0, cfg.max_seq_len)


def _only_row(example: Example, train_on: str, chat: Chat) -> TokenRow:
    made = rows_of(chat, [example], train_on)[0]
    # Its longer form was rendered, so an error is a whim of a template; no row: nothing is learnt.
    if isinstance(made, RowError) or not made:
        return TokenRow(np.empty(0, np.int32), np.empty(0, bool))
    return made[-1]


def _shortened(message: Message, num_tokens: int, chat: Chat) -> Message:
    """The message with the last tokens of its text."""
    offsets = chat.encode([message.content])[0][1]
    if len(offsets) <= num_tokens:
        return message
    return message._replace(content=message.content[int(offsets[-num_tokens][0]) :])
