"""The sources that the config names -> examples and bad rows, in order."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from jaxtune.data import formats, sources
from jaxtune.data.examples import KINDS, OBJECTIVES, Example, Parsed
from jaxtune.data.locations import Source, files_of
from jaxtune.data.registry import read_registry, rename, source_of
from jaxtune.data.rows import BadRow, Record, RowError
from jaxtune.errors import ConfigError, DataError, nearest
from jaxtune.schema import Data

Kind = TypeVar("Kind")  # of `examples.KINDS`


def sources_of(cfg: Data, split: str) -> list[Source]:
    """The sources of data.train (split "train") or data.eval ("eval"), with their files.

    Raises:
        DataError: one of them names nothing.
        ConfigError: data.columns is malformed.
    """
    entries = {} if cfg.registry is None else read_registry(cfg.registry)
    columns = dict(_column(item) for item in cfg.columns)
    found = []
    for name in cfg.train if split == "train" else cfg.eval:
        if cfg.registry is not None and name in entries:
            found.append(source_of(name, entries, Path(cfg.registry).expanduser().parent))
            continue
        try:
            files = files_of(name, split)
        except DataError as error:
            if cfg.registry is None:
                raise
            hint = nearest(name, entries)
            raise DataError(f"{name} is no entry of data.registry{hint}; {error}") from error
        found.append(Source(name, files, cfg.format, columns))
    return found


def _column(item: str) -> tuple[str, str]:
    ours, equals, theirs = item.partition("=")
    if not equals:
        raise ConfigError(f"data.columns={item!r}: write field=column, as output=answer")
    return ours, theirs


def read_examples(found: Iterable[Source], cfg: Data, kind: type[Kind]) -> Iterator[Kind | BadRow]:
    """Reads and converts the rows of all sources, one after the other.

    Args:
        found: the sources.
        cfg: the data section of the config.
        kind: what the rows must say, a type of `examples.KINDS`.

    Raises:
        DataError: a file cannot be read, or the first row of one fits no format.
        ConfigError: data.function is none, or rows are of another kind.
    """
    for source in found:
        for file in source.files:
            rows = sources.read(file, cfg.max_line_bytes, cfg.text_rows)
            yield from examples_of(rows, source, cfg, kind)


def examples_of(
    rows: Iterable[Record | BadRow], source: Source, cfg: Data, kind: type[Kind]
) -> Iterator[Kind | BadRow]:
    """Converts rows of one file of a source, which must be of a kind.

    Raises:
        DataError, ConfigError: as `read_examples`.
    """
    for row in convert(rows, source, cfg):
        if not isinstance(row, (BadRow, kind)):
            raise ConfigError(
                f"{row.origin}: {KINDS[type(row)]} cannot be trained on by "
                f"objective.name={OBJECTIVES[kind]} - give {KINDS[kind]}, or set data.format to "
                "what the rows are"
            )
        yield row


def convert(
    rows: Iterable[Record | BadRow], source: Source, cfg: Data
) -> Iterator[Parsed | BadRow]:
    """Converts rows of one file of a source; the first of them shows the format.

    A row that data.function leaves out is gone.

    Raises:
        DataError: the first row fits no format.
        ConfigError: data.function is none.
    """
    format_name = None if source.format == "auto" else source.format
    for row in _renamed(rows, source, cfg):
        if isinstance(row, BadRow):
            yield row
            continue
        format_name = format_name or formats.recognise(row)
        try:
            example = formats.to_example(row, format_name)
        except RowError as error:
            yield BadRow(row.origin, error.field, error.reason)
            continue
        if cfg.template == "none" and isinstance(example, Example):
            example = replace(example, raw=True)
        yield example


def format_of(rows: Iterable[Record | BadRow], source: Source, cfg: Data) -> str:
    """The format of one file of a source, which its first usable row shows; "auto" without one.

    Raises:
        DataError, ConfigError: as `convert`.
    """
    if source.format != "auto":
        return source.format
    usable = (row for row in _renamed(rows, source, cfg) if isinstance(row, Record))
    first = next(usable, None)
    return "auto" if first is None else formats.recognise(first)


def _renamed(
    rows: Iterable[Record | BadRow], source: Source, cfg: Data
) -> Iterator[Record | BadRow]:
    """The rows with our names of fields, after data.function."""
    function = None if cfg.function is None else formats.row_function(cfg.function)
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            fields = rename(row.fields, source)
            fields = fields if function is None else formats.apply(function, fields)
        except RowError as error:
            yield BadRow(row.origin, error.field, error.reason)
            continue
        if fields is not None:
            yield Record(row.origin, fields)
