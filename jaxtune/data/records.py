"""Files -> examples and bad rows, in order."""

from collections.abc import Iterable, Iterator, Sequence

from jaxtune.data import sources
from jaxtune.data.formats import Example, recognise, to_example
from jaxtune.data.sources import BadRow, Record, RowError
from jaxtune.schema import Data


def read_examples(paths: Sequence[str], cfg: Data) -> Iterator[Example | BadRow]:
    """Reads and converts the rows of all files, one after the other."""
    for path in paths:
        yield from convert(sources.read(path, cfg.max_line_bytes), cfg)


def convert(rows: Iterable[Record | BadRow], cfg: Data) -> Iterator[Example | BadRow]:
    """Converts rows of one file; the first of them shows the format."""
    format_name = None if cfg.format == "auto" else cfg.format
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        format_name = format_name or recognise(row)
        try:
            yield to_example(row, format_name)
        except RowError as error:
            yield BadRow(row.origin, error.field, error.reason)
