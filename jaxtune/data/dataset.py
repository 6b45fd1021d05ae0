"""The whole way from files to tokenized rows, with everything that was left out counted."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtune.data import cache, formats, label_rows, mixtures, pairs, sources, table
from jaxtune.data.chunks import COUNTED, check_chunks, check_vocabulary
from jaxtune.data.examples import Example
from jaxtune.data.labelling import KINDS, Labelling
from jaxtune.data.locations import Source
from jaxtune.data.position import ROW_OPTIONS, identity_of
from jaxtune.data.records import read_examples, sources_of
from jaxtune.data.rows import BadRow
from jaxtune.data.stream import Stream, open_stream
from jaxtune.data.table import Chunk, TokenTable
from jaxtune.data.tokenize import chat_of
from jaxtune.data.workers import make_chunks
from jaxtune.errors import ConfigError, DataError
from jaxtune.log import counting
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SourceStats(NamedTuple):
    """What remains of one source: its name, tokenized rows, tokens, and those that carry loss."""

    name: str
    rows: int
    tokens: int
    trained_tokens: int


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
        sources: what remains of each source, in the order of the config.
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
    sources: tuple[SourceStats, ...] = ()

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens ({self.trained_tokens} trained), "
        text += f"longest {self.longest}"
        notes = {
            "bad rows skipped": self.bad,
            "truncated": self.truncated,
            "too long, dropped": self.dropped,
            "without anything to learn, dropped": self.untrained,
            "added by splitting": self.split,
            "without an end-of-turn token": self.unended,
        }
        text = "; ".join([text, *(f"{count} {what}" for what, count in notes.items() if count)])
        for source in self.sources if len(self.sources) > 1 else ():
            text += f"\n  {source.name}: {source.rows} rows, {source.tokens} tokens "
            text += f"({source.trained_tokens} trained)"
        return text


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
    cfg: Data,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    seed: int,
    vocab_size: int,
    num_virtual_tokens: int = 0,
    labelling: Labelling | None = None,
    paired: bool = False,
) -> tuple[Dataset | Stream, Dataset | None]:
    """Reads and tokenizes the training and held-out data, or finds them in the cache.

    With `streaming` the training data are only opened.

    Args:
        cfg: the data section of the config.
        tokenizer: with a chat template.
        seed: decides which rows `eval_fraction` holds out, and how sources are mixed.
        vocab_size: rows of the model's embedding table.
        num_virtual_tokens: places of a prompt at the start of every example; max_seq_len counts
            them too.
        labelling: of rows with labels; None: conversations and texts.
        paired: what stands before an answer is a source, and the answer its target.

    Returns:
        The training set, and the held-out set if the config asks for one.

    Raises:
        ConfigError: nothing to train on is named, the tokenizer has no usable chat template, or
            data.function is none.
        DataError: files are missing or unreadable, rows are bad, or nothing usable remains.
        WeightError: the tokenizer makes ids that the model has no embedding for.
    """
    if not cfg.train:
        raise ConfigError("data.train is empty - name at least one file of training data")
    # A template or function that cannot be used is named before files are read.
    if labelling is None and not paired:
        chat_of(tokenizer)
    if cfg.function is not None:
        formats.row_function(cfg.function)
    found, held_out_found = sources_of(cfg, "train"), sources_of(cfg, "eval")
    cfg = dataclasses.replace(cfg, max_seq_len=cfg.max_seq_len - num_virtual_tokens)
    tokenized = functools.partial(
        _Sources,
        cfg=cfg,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        room=num_virtual_tokens,
        labelling=labelling,
        paired=paired,
    )
    held_out = tokenized(held_out_found) if held_out_found else None
    measured = held_out and held_out.dataset(np.ones(len(held_out.is_bad), bool))
    if cfg.streaming:
        return open_stream(found, cfg, tokenizer, vocab_size), measured
    train = tokenized(found)
    if measured is not None or not cfg.eval_fraction:
        return train.dataset(np.ones(len(train.is_bad), bool), seed), measured
    considered = train.considered()
    part = _held_out(considered & ~train.is_bad, cfg.eval_fraction, seed)
    return train.dataset(considered & ~part, seed), train.dataset(part)


class _Sources:
    """Some sources, tokenized, of whose examples datasets are made."""

    def __init__(
        self,
        found: Sequence[Source],
        cfg: Data,
        tokenizer: "PreTrainedTokenizerFast",
        vocab_size: int,
        room: int,
        labelling: Labelling | None,
        paired: bool,
    ):
        self._found, self._cfg, self._room, self._paired = found, cfg, room, paired
        self._kind = Example if labelling is None else KINDS[labelling.objective]
        self._tokenizer = cache.tokenizer_identity(tokenizer)

        def make(records: Iterator[Any]) -> Iterator[Chunk]:
            if paired:
                return pairs.make_chunks(records, tokenizer, cfg)
            if labelling is None:
                return make_chunks(records, tokenizer, cfg)
            return label_rows.make_chunks(records, tokenizer, cfg, labelling)

        self._made = cache.tokenized(
            found,
            cfg,
            tokenizer,
            lambda folder: _write(folder, found, cfg, self._kind, make),
            "pairs" if paired else labelling,
        )
        check_vocabulary(self._made.highest, tokenizer, vocab_size)
        self.is_bad = self._made.counts[:, COUNTED.index("bad")] > 0

    def considered(self) -> np.ndarray:
        """The records that data.max_samples leaves, bool [E]."""
        usable = np.zeros(len(self.is_bad), bool)
        usable[self._made.owners] = True
        return mixtures.considered(usable, self._made.sizes, self._cfg)

    def dataset(self, part: np.ndarray, seed: int | None = None) -> Dataset:
        """The dataset of some records.

        Args:
            part: bool [E], the records.
            seed: mixes the sources as the config says; None: one after the other.

        Raises:
            ConfigError: options of the mixture do not fit the sources.
            DataError: nothing usable remains of the records.
        """
        made = self._made
        rows = np.flatnonzero(part[made.owners])
        counts = made.counts[part].sum(axis=0).tolist()
        if seed is not None and len(rows):
            rows = _rows_of(self._mixed(rows, seed), made.owners)
        chosen = made.table.select(rows)
        stats = Stats(
            records=int(part.sum()),
            rows=len(rows),
            tokens=int(chosen.lengths.sum()),
            trained_tokens=int(made.targets[rows].sum()),
            longest=int(chosen.lengths.max(initial=0)),
            sources=self._by_source(rows),
            **dict(zip(COUNTED, counts, strict=True)),
        )
        if not stats.rows:
            names = ", ".join(source.name for source in self._found)
            raise DataError(f"{names}: no usable row{_why_none(stats)}")
        return Dataset(
            rows=dataclasses.replace(chosen, room=self._room, paired=self._paired),
            fingerprint=self._fingerprint(part),
            tokenizer=self._tokenizer,
            stats=stats,
            read_examples=lambda: self._read(made.owners[rows]),
        )

    def _mixed(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """The records of the rows, mixed."""
        usable = np.unique(self._made.owners[rows])
        of_source = np.split(usable, np.searchsorted(usable, np.cumsum(self._made.sizes)[:-1]))
        drawn = [source.num_samples for source in self._found]
        return mixtures.mixed(of_source, drawn, self._cfg, seed)

    def _by_source(self, rows: np.ndarray) -> tuple[SourceStats, ...]:
        made = self._made
        source_of = np.searchsorted(np.cumsum(made.sizes), made.owners[rows], side="right")
        return tuple(
            SourceStats(
                source.name,
                len(own := rows[source_of == index]),
                int(made.table.lengths[own].sum()),
                int(made.targets[own].sum()),
            )
            for index, source in enumerate(self._found)
        )

    def _read(self, records: np.ndarray) -> list[Example]:
        """The examples of some records, each once, in order."""
        kept = dict.fromkeys(records.tolist())
        numbered = enumerate(read_examples(self._found, self._cfg, self._kind))
        made = {i: row for i, row in numbered if i in kept and not isinstance(row, BadRow)}
        return [made[record] for record in kept]

    def _fingerprint(self, part: np.ndarray) -> str:
        files = [file for source in self._found for file in source.files]
        total = hashlib.sha256(sources.hash_files(files).encode())
        options = [(name, getattr(self._cfg, name)) for name in ROW_OPTIONS]
        parts = (options, identity_of(self._found), self._made.sizes, self._made.digest)
        total.update(repr(parts).encode() + part.tobytes())
        return total.hexdigest()


def _rows_of(records: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The rows of records, one record after the other; `owners` ascend."""
    first, last = (np.searchsorted(owners, records, side) for side in ("left", "right"))
    counts = last - first
    return np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def _write(
    folder: Path,
    found: Sequence[Source],
    cfg: Data,
    kind: type,
    make: Callable[[Iterator[Any]], Iterator[Chunk]],
) -> None:
    """Tokenizes sources, whose rows are of a kind, into a folder."""
    sizes = [0] * len(found)

    def examples() -> Iterator[Any]:
        for index, source in enumerate(found):
            for record in read_examples([source], cfg, kind):
                sizes[index] += 1
                yield record

    def counted() -> Iterator[Chunk]:
        rows = tokens = 0
        with counting("tokenizing") as report:
            for chunk in make(examples()):
                yield chunk
                rows += len(chunk.lengths)
                tokens += len(chunk.tokens)
                report(f"{rows:,} rows, {tokens:,} tokens")

    table.write(folder, check_chunks(counted(), cfg), lambda: sizes)


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
