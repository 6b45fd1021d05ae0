"""Files that are read as they are needed, for more data than anybody wants to tokenize first.

A file of JSON lines is cut into units of `UNIT` bytes; a line belongs to the unit that it begins
in. Other files are one unit each. An epoch is a permutation of the units of all files, and epochs
follow each other without end, so a place in the stream is one number.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxtune.data import cache, sources
from jaxtune.data.chunks import Tally, check_chunks, check_vocabulary, make_chunk
from jaxtune.data.examples import Example
from jaxtune.data.json_rows import BOM, read_lines
from jaxtune.data.locations import Source
from jaxtune.data.position import ROW_OPTIONS, identity_of
from jaxtune.data.records import examples_of, format_of
from jaxtune.data.rows import BadRow
from jaxtune.data.table import Chunk, TokenTable, joined
from jaxtune.data.tokenize import chat_of
from jaxtune.data.workers import batches_of
from jaxtune.errors import DataError
from jaxtune.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIT = 1 << 18
LARGEST = 1 << 28  # bytes of a file that has to be one unit
# Options that may change: they decide when bad rows stop a run, or say where `identity_of` looks.
NOT_IN_STREAM = ("on_bad_row", "max_bad_fraction", "registry", "columns")
# What a fingerprint looks at: so many bytes of all files, evenly spread, in places of this size.
LOOKED, PLACE = 1 << 26, 1 << 14
_one_at_a_time = threading.Lock()  # a fast tokenizer cannot be used by two threads
PROBED = 8  # units looked at for a first usable row
JUDGED = 500  # rows at least of which data.max_bad_fraction is a share: units may hold very few


class Unit(NamedTuple):
    """The rows of a file that begin at bytes `start` to `stop`; all rows if `stop` is None.

    The format of `source` is that of the whole file, where the file has several units.
    """

    source: Source
    path: Path
    start: int
    stop: int | None


@dataclass(frozen=True, eq=False)
class Stream:
    """Files to read from; make it with `open_stream`.

    Attributes:
        cfg: the data section of the config.
        units: of all files, in order.
        num_bytes: size of all files.
        fingerprint: sha256 over what the files look like and the options.
        tokenizer: sha256 of the tokenizer and its chat template.
        mean_length: tokens of a row, in the first unit.
    """

    cfg: Data
    units: Sequence[Unit]
    num_bytes: int
    fingerprint: str
    tokenizer: str
    mean_length: float
    _tokenizer: "PreTrainedTokenizerFast"
    _vocab_size: int
    _tally: Tally

    @property
    def stats(self) -> str:
        """What is known before everything was read."""
        return (
            f"streamed from {self.num_bytes / 2**20:,.1f} MiB in {len(self.units):,} units; rows "
            f"of about {self.mean_length:.0f} tokens"
        )

    def read(self, first: int, count: int, seed: int) -> TokenTable:
        """The rows of `count` units, of the endless sequence of epochs, from number `first` on.

        Raises:
            DataError, WeightError: as `dataset.load`, about these units.
        """
        numbers = range(first, first + count)
        size = len(self.units)
        if self.cfg.shuffle:
            places = [_permutation(size, seed, n // size)[n % size] for n in numbers]
        else:
            places = [n % size for n in numbers]
        chosen = [self.units[p] for p in places]
        return _table(chosen, self.cfg, self._tokenizer, self._vocab_size, self._tally)


def open_stream(
    found: Sequence[Source], cfg: Data, tokenizer: "PreTrainedTokenizerFast", vocab_size: int
) -> Stream:
    """Opens the files of sources as a stream and looks at their beginning.

    Raises:
        ConfigError, DataError, WeightError: as `dataset.load`.
    """
    paths = [path for source in found for path in source.files]
    units = [
        unit for source in found for path in source.files for unit in _units(source, path, cfg)
    ]
    tally = Tally(floor=JUDGED)
    table = _table(units[:1], cfg, tokenizer, vocab_size, tally)
    for unit in units[1:PROBED]:
        table = table if len(table) else _table([unit], cfg, tokenizer, vocab_size, tally)
    if not len(table):
        names = ", ".join(source.name for source in found)
        raise DataError(f"{names}: no usable row in the first units - check the files")
    options = cache.row_options(cfg)
    options |= {name: getattr(cfg, name) for name in (*ROW_OPTIONS, "shuffle_units")}
    kept = [(name, value) for name, value in options.items() if name not in NOT_IN_STREAM]
    identity = cache.tokenizer_identity(tokenizer)
    looks = hashlib.sha256(repr((kept, identity_of(found), identity, UNIT)).encode())
    share = max(LOOKED // len(paths), 4 * PLACE)
    for path in paths:
        looks.update(_look(path, share))
    return Stream(
        cfg=cfg,
        units=units,
        num_bytes=sum(path.stat().st_size for path in paths),
        fingerprint=looks.hexdigest(),
        tokenizer=identity,
        mean_length=float(table.lengths.mean()),
        _tokenizer=copy.deepcopy(tokenizer),  # used by threads while others use the original
        _vocab_size=vocab_size,
        _tally=Tally(floor=JUDGED),
    )


def _units(source: Source, path: Path, cfg: Data) -> list[Unit]:
    """The units of a file."""
    if source.num_samples is not None:
        raise DataError(
            f"{source.name} has num_samples, but data.streaming reads whole files - leave it out"
        )
    if not path.is_file():
        raise DataError(f"data.streaming reads files, and {path} is a folder - name its files")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 16).removeprefix(BOM).lstrip()
    if head.startswith(b"{"):
        starts = range(0, size, UNIT)
        if len(starts) > 1:
            with path.open("rb") as file:
                name = format_of(read_lines(path, file, cfg.max_line_bytes), source, cfg)
            source = dataclasses.replace(source, format=name)
        return [Unit(source, path, start, min(start + UNIT, size)) for start in starts]
    if size > LARGEST:
        raise DataError(
            f"{path} has {size / 2**20:,.0f} MiB; data.streaming takes files that are not plain "
            f"JSON lines whole, up to {LARGEST >> 20} MiB - split it, or set data.streaming=false"
        )
    return [Unit(source, path, 0, None)]


def _look(place: Path, share: int) -> bytes:
    """sha256 of a file's size and `share` bytes of it, evenly spread."""
    size = place.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with place.open("rb") as file:
        if size <= share:
            total.update(file.read())
        else:
            count = share // PLACE
            for n in range(count):
                file.seek((size - PLACE) * n // (count - 1))
                total.update(file.read(PLACE))
    return total.digest()


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _table(
    units: Sequence[Unit],
    cfg: Data,
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    tally: Tally,
) -> TokenTable:
    """The tokenized rows of some units; `tally` counts them."""

    def chunks() -> Iterator[Chunk]:
        chat = chat_of(tokenizer)
        for unit in units:
            for batch in batches_of(_records(unit, cfg)):
                yield make_chunk(batch, chat, cfg)

    with _one_at_a_time:
        table = joined(list(check_chunks(chunks(), cfg, tally)))
    check_vocabulary(int(table.tokens.max(initial=-1)), tokenizer, vocab_size)
    return table


def _records(unit: Unit, cfg: Data) -> Iterator[Example | BadRow]:
    """Reads and converts the rows of a unit; their origin is "file@first byte of the unit:line"."""
    if unit.stop is None:
        rows = sources.read(unit.path, cfg.max_line_bytes, cfg.text_rows)
        return examples_of(rows, unit.source, cfg, Example)
    with unit.path.open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        content = file.read(max(unit.stop - file.tell(), 0))
        if content and not content.endswith(b"\n"):
            content += file.readline(cfg.max_line_bytes + 1)
    place = Path(f"{unit.path}@{unit.start}")
    rows = read_lines(place, io.BytesIO(content), cfg.max_line_bytes)
    return examples_of(rows, unit.source, cfg, Example)
