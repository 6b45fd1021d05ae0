"""The whole way from files to tokenized rows, with everything that was left out counted."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data import cache, sources, table
from jaxtune.data.chunks import COUNTED, check_chunks, check_vocabulary
from jaxtune.data.formats import Example
from jaxtune.data.position import ROW_OPTIONS
from jaxtune.data.records import read_examples
from jaxtune.data.sources import BadRow
from jaxtune.data.stream import Stream, open_stream
from jaxtune.data.table import Chunk, TokenTable
from jaxtune.data.tokenize import chat_of
from jaxtune.data.workers import make_chunks
from jaxtune.errors import ConfigError, DataError
from jaxtune.log import counting
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        fingerprint: sha256 over file contents, options and ids; equal means equal batches.
        tokenizer: sha256 of the tokenizer and its chat template.
        stats: what was read, left out and cut.
        read_examples: reads the conversations behind the rows.
    """

    rows: TokenTable
    fingerprint: str
    tokenizer: str
    stats: Stats
    read_examples: Callable[[], list[Example]]

    @property
    def mean_length(self) -> float:
        """Tokens of a row."""
        return self.stats.tokens / len(self.rows)

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The conversations behind the rows (for evaluation by generation), read from the files."""
        return self.read_examples()


def load(
    cfg: Data, tokenizer: "PreTrainedTokenizerFast", *, seed: int, vocab_size: int
) -> tuple[Dataset | Stream, Dataset | None]:
    """Reads and tokenizes the training and held-out data, or finds them in the cache.

    With `streaming` the training data are only opened.

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
    chat_of(tokenizer)  # a template that cannot be used is named before files are read
    if cfg.streaming:
        held_out = _Files(cfg.eval, cfg, tokenizer, vocab_size).dataset() if cfg.eval else None
        return open_stream(cfg.train, cfg, tokenizer, vocab_size), held_out
    files = _Files(cfg.train, cfg, tokenizer, vocab_size)
    if cfg.eval:
        return files.dataset(), _Files(cfg.eval, cfg, tokenizer, vocab_size).dataset()
    if not cfg.eval_fraction:
        return files.dataset(), None
    held_out = _held_out(~files.is_bad, cfg.eval_fraction, seed)
    return files.dataset(~held_out), files.dataset(held_out)


class _Files:
    """Some files, tokenized, of whose examples datasets are made."""

    def __init__(
        self,
        paths: Sequence[str],
        cfg: Data,
        tokenizer: "PreTrainedTokenizerFast",
        vocab_size: int,
    ):
        self._paths, self._cfg = paths, cfg
        self._tokenizer = cache.tokenizer_identity(tokenizer)
        self._made = cache.tokenized(
            paths, cfg, tokenizer, lambda folder: _write(folder, paths, cfg, tokenizer)
        )
        check_vocabulary(self._made.highest, tokenizer, vocab_size)
        self.is_bad = self._made.counts[:, COUNTED.index("bad")] > 0

    def dataset(self, part: np.ndarray | None = None) -> Dataset:
        """The dataset of some records, bool [E]; None: of all.

        Raises:
            DataError: nothing usable remains of them.
        """
        made = self._made
        part = np.ones(len(made.counts), bool) if part is None else part
        rows = np.flatnonzero(part[made.owners])
        chosen = made.table.select(rows)
        counts = made.counts[part].sum(axis=0).tolist()
        stats = Stats(
            records=int(part.sum()),
            rows=len(rows),
            tokens=int(chosen.lengths.sum()),
            trained_tokens=int(made.targets[rows].sum()),
            longest=int(chosen.lengths.max(initial=0)),
            **dict(zip(COUNTED, counts, strict=True)),
        )
        if not stats.rows:
            raise DataError(f"{', '.join(self._paths)}: no usable row{_why_none(stats)}")
        kept = set(made.owners[rows].tolist())
        return Dataset(
            rows=chosen,
            fingerprint=self._fingerprint(part),
            tokenizer=self._tokenizer,
            stats=stats,
            read_examples=lambda: self._read(kept),
        )

    def _read(self, kept: set[int]) -> list[Example]:
        records = enumerate(read_examples(self._paths, self._cfg))
        return [row for i, row in records if i in kept and not isinstance(row, BadRow)]

    def _fingerprint(self, part: np.ndarray) -> str:
        total = hashlib.sha256(sources.hash_files(self._paths).encode())
        options = [(name, getattr(self._cfg, name)) for name in ROW_OPTIONS]
        total.update(repr((options, self._made.digest)).encode() + part.tobytes())
        return total.hexdigest()


def _write(
    folder: Path, paths: Sequence[str], cfg: Data, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Tokenizes files into a folder."""

    def counted() -> Iterator[Chunk]:
        rows = tokens = 0
        with counting("tokenizing") as report:
            for chunk in make_chunks(read_examples(paths, cfg), tokenizer, cfg):
                yield chunk
                rows += len(chunk.lengths)
                tokens += len(chunk.tokens)
                report(f"{rows:,} rows, {tokens:,} tokens")

    table.write(folder, check_chunks(counted(), cfg))


def _held_out(usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which records are held out, bool [E]: a share of the usable ones, at least one, never all."""
    places = np.flatnonzero(usable)
    chosen = np.zeros(len(usable), bool)
    if not len(places):
        return chosen
    if len(places) < 2:
        raise DataError(
            f"data.eval_fraction={fraction} cannot split one row - name data.eval files"
        )
    count = min(max(1, round(len(places) * fraction)), len(places) - 1)
    chosen[places[np.random.default_rng(seed).permutation(len(places))[:count]]] = True
    return chosen


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
