"""The whole way from files to tokenized rows, with everything that was left out counted."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data import sources
from jaxtune.data.batch import TokenRow
from jaxtune.data.formats import Example, recognise, to_example
from jaxtune.data.sources import BadRow, RowError
from jaxtune.data.tokenize import Chat, chat_of, rows_of
from jaxtune.errors import ConfigError, DataError, WeightError, listing
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COUNTED = ("truncated", "dropped", "untrained", "split", "unended")  # fields of Stats
BATCH = 512  # examples tokenized together
# The options that change what a row of the training data is; a change of one is a change of data.
ROW_OPTIONS = (
    *("format", "max_seq_len", "packing", "packer", "isolated", "loss_weights", "train_on"),
    *("overlong", "shuffle"),
)


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the records that were read. All are counts.

    Attributes:
        records: rows read from the files, bad ones included.
        bad: rows that broke their schema or their chat template, skipped.
        rows: tokenized rows that remain.
        tokens: tokens in them; `trained_tokens` of these carry loss; `longest` is the longest row.
        truncated: rows cut to max_seq_len.
        dropped: rows left out because they were longer than max_seq_len.
        untrained: rows left out because nothing in them is learnt (empty or cut-off answers).
        split: additional rows, from templates that rewrite earlier turns.
        unended: rows whose last answer is learnt without an end-of-turn token.
    """

    records: int = 0
    bad: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0
    split: int = 0
    unended: int = 0

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens ({self.trained_tokens} trained), "
        text += f"longest {self.longest}"
        notes = {
            "bad rows skipped": self.bad,
            "truncated": self.truncated,
            "too long, dropped": self.dropped,
            "without anything to learn, dropped": self.untrained,
            "added by splitting conversations into turns": self.split,
            "without an end-of-turn token": self.unended,
        }
        return "; ".join([text, *(f"{count} {what}" for what, count in notes.items() if count)])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenized rows in the order of their files.

    Attributes:
        rows: what is trained or evaluated on.
        examples: the conversations behind the rows (for evaluation by generation).
        fingerprint: sha256 over file contents, options and ids; equal means equal batches.
        stats: what was read, left out and cut.
    """

    rows: list[TokenRow]
    examples: list[Example]
    fingerprint: str
    stats: Stats


def load(
    cfg: Data, tokenizer: "PreTrainedTokenizerFast", *, seed: int, vocab_size: int
) -> tuple[Dataset, Dataset | None]:
    """Reads and tokenizes the training and held-out data.

    Args:
        cfg: the data section of the config.
        tokenizer: with a chat template.
        seed: decides which rows `eval_fraction` holds out.
        vocab_size: rows of the model's embedding table.

    Returns:
        The training set, and the held-out set if the config asks for one.

    Raises:
        ConfigError: nothing to train on is named, or the tokenizer has no usable chat template.
        DataError: files are missing or unreadable, rows are bad, or nothing usable remains.
        WeightError: the tokenizer makes ids that the model has no embedding for.
    """
    if not cfg.train:
        raise ConfigError("data.train is empty - name at least one file of training data")
    chat = chat_of(tokenizer)
    train, train_bad = _read_examples(cfg.train, cfg)
    held_out: list[Example] = []
    held_out_files = cfg.eval
    if cfg.eval:
        held_out, held_out_bad = _read_examples(cfg.eval, cfg)
    elif cfg.eval_fraction > 0:
        train, held_out = _split(train, cfg.eval_fraction, seed)
        held_out_files, held_out_bad = cfg.train, []
    dataset = _tokenize(train, train_bad, cfg.train, cfg, chat, vocab_size)
    if not held_out_files:
        return dataset, None
    return dataset, _tokenize(held_out, held_out_bad, held_out_files, cfg, chat, vocab_size)


def _read_examples(paths: Sequence[str], cfg: Data) -> tuple[list[Example], list[BadRow]]:
    """Reads and converts all rows of all files."""
    examples: list[Example] = []
    bad: list[BadRow] = []
    for path in paths:
        format_name = None if cfg.format == "auto" else cfg.format
        for row in sources.read(path, cfg.max_line_bytes):
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            format_name = format_name or recognise(row)
            try:
                examples.append(to_example(row, format_name))
            except RowError as error:
                bad.append(BadRow(row.origin, error.field, error.reason))
    return examples, bad


def _split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Holds out a share of the examples: at least one, and never all."""
    if not examples:
        return [], []
    if len(examples) < 2:
        raise DataError(
            f"data.eval_fraction={fraction} cannot split one row - name data.eval files"
        )
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]


def _tokenize(
    examples: list[Example],
    bad: list[BadRow],
    paths: Sequence[str],
    cfg: Data,
    chat: Chat,
    vocab_size: int,
) -> Dataset:
    """Tokenizes examples and applies the policies on bad, over-long and empty rows."""
    records = len(examples) + len(bad)
    rows: list[TokenRow] = []
    kept: list[Example] = []
    counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
    too_long: list[str] = []
    for example, made in _tokenized(examples, chat, cfg.train_on):
        if isinstance(made, RowError):
            bad.append(BadRow(example.origin, made.field, made.reason))
            continue
        counts["split"] += len(made) - 1
        fitted = [_fit(row, cfg, counts) for row in made]
        if cfg.overlong == "error":
            lengths = (len(row.tokens) for row in made)
            too_long += [f"{example.origin}: {n} tokens" for n in lengths if n > cfg.max_seq_len]
        has_answer = any(m.content.strip() for m in example.messages if m.role == "assistant")
        usable = [row for row in fitted if row and has_answer and row.trained.any()]
        counts["untrained"] += sum(row is not None for row in fitted) - len(usable)
        counts["unended"] += has_answer and not chat.is_ended(made[-1])
        rows += usable
        kept += [example] * bool(usable)
    _check_bad(bad, records, cfg)
    if too_long:
        raise DataError(
            f"{len(too_long)} rows are longer than data.max_seq_len={cfg.max_seq_len} - raise it, "
            f"or set data.overlong to truncate_right, truncate_left or drop:{listing(too_long)}"
        )
    stats = Stats(
        records=records,
        bad=len(bad),
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        trained_tokens=sum(int(row.trained.sum()) for row in rows),
        longest=max((len(row.tokens) for row in rows), default=0),
        **counts,
    )
    if not rows:
        raise DataError(f"{', '.join(paths)}: no usable row{_why_none(stats)}")
    _check_vocabulary(rows, chat, vocab_size)
    return Dataset(rows, kept, _fingerprint(rows, paths, cfg), stats)


def _tokenized(
    examples: list[Example], chat: Chat, train_on: str
) -> Iterator[tuple[Example, list[TokenRow] | RowError]]:
    """Tokenizes in batches, since the offsets of a batch take far more memory than its ids."""
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        yield from zip(some, rows_of(chat, some, train_on), strict=True)


def _fit(row: TokenRow, cfg: Data, counts: dict[str, int]) -> TokenRow | None:
    """Applies `overlong` to one row; None where the row is dropped."""
    limit = cfg.max_seq_len
    if len(row.tokens) <= limit or cfg.cuts_examples:
        return row
    if cfg.overlong in ("drop", "error"):
        counts["dropped"] += 1
        return None
    counts["truncated"] += 1
    if cfg.overlong == "truncate_right":
        return TokenRow(row.tokens[:limit], row.trained[:limit])
    trained = row.trained[-limit:].copy()
    trained[0] = False  # its context is gone
    return TokenRow(row.tokens[-limit:], trained)


def _check_bad(bad: list[BadRow], records: int, cfg: Data) -> None:
    if not bad:
        return
    found = f"{len(bad)} of {records} rows are bad"
    if cfg.on_bad_row == "error":
        raise DataError(
            f"{found} - repair them, or set data.on_bad_row=skip:{listing(map(str, bad))}"
        )
    if len(bad) > cfg.max_bad_fraction * records:
        raise DataError(
            f"{found}, more than data.max_bad_fraction={cfg.max_bad_fraction} - repair them, "
            f"or raise the limit:{listing(map(str, bad))}"
        )


def _why_none(stats: Stats) -> str:
    if not stats.records:
        return " (empty) - give files with at least one row"
    reasons = {
        "bad": stats.bad,
        "longer than data.max_seq_len": stats.dropped,
        "with nothing to learn": stats.untrained,
    }
    counted = ", ".join(f"{count} {what}" for what, count in reasons.items() if count)
    return f" ({stats.records} read: {counted}) - check answers and data.max_seq_len"


def _check_vocabulary(rows: list[TokenRow], chat: Chat, vocab_size: int) -> None:
    # An id beyond the table would not fail on the device: the lookup clamps it silently.
    highest = max(int(row.tokens.max()) for row in rows)
    if highest >= vocab_size:
        text = chat.tokenizer.convert_ids_to_tokens(highest)
        raise WeightError(
            f"the tokenizer makes token id {highest} ({text!r}), but the model has only "
            f"{vocab_size} embeddings - set model.tokenizer to the model's own tokenizer"
        )


def _fingerprint(rows: list[TokenRow], paths: Sequence[str], cfg: Data) -> str:
    total = hashlib.sha256(sources.hash_files(paths).encode())
    options = dataclasses.asdict(cfg)
    total.update(repr([(name, options[name]) for name in ROW_OPTIONS]).encode())
    for row in rows:
        total.update(np.int64(len(row.tokens)).tobytes() + row.tokens.tobytes())
        total.update(row.trained.tobytes())
    return total.hexdigest()
