"""Rows with labels -> token ids, types and labels of single tokens.

Ids, types and truncation (of the longer text first) are those of a transformers tokenizer called
with a text, a pair of texts or words. A text is labelled at its first or last token, a word at its
first token, an answer at the tokens where it starts and ends in its context; without an answer
these are the first token, and so they are in a window that does not hold the answer.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtune.data.batch import TokenRow
from jaxtune.data.chunks import counted, joined
from jaxtune.data.examples import Classified, Extractive, Labelled, Tagged
from jaxtune.data.labelling import Labelling
from jaxtune.data.rows import BadRow, RowError
from jaxtune.data.table import LABEL, TYPE, Chunk
from jaxtune.data.windows import windows
from jaxtune.data.workers import batches_of
from jaxtune.schema import Data

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class Marks(NamedTuple):
    """Which tokens of a row are labelled, ascending, and with what, float32 [M, C]."""

    places: list[int]
    labels: np.ndarray


class Piece(NamedTuple):
    """A row of a record.

    Attributes:
        kept: the tokens of the record's encoding that it has, ascending.
        marks: which of these are labelled.
    """

    kept: np.ndarray
    marks: Marks


_NOWHERE = Marks([0], np.ones((1, 2), np.float32))  # no answer: it starts and ends at the first


def make_chunks(
    records: Iterator[Labelled | BadRow],
    tokenizer: "PreTrainedTokenizerFast",
    cfg: Data,
    labelling: Labelling,
) -> Iterator[Chunk]:
    """Tokenizes records in order; what is too long is cut, dropped or refused (data.overlong)."""
    backend = backend_of(tokenizer, labelling)
    if not _has_windows(cfg, labelling):
        backend.enable_truncation(cfg.max_seq_len, strategy="longest_first")
    for batch in batches_of(records):
        yield _chunk(batch, backend, cfg, labelling)


def _has_windows(cfg: Data, labelling: Labelling) -> bool:
    return cfg.overlong == "split" and labelling.objective == "question_answering"


def backend_of(tokenizer: "PreTrainedTokenizerFast", labelling: Labelling) -> "Tokenizer":
    """A copy of the tokenizer that neither pads nor cuts, and begins words as after a space."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = state["pre_tokenizer"] or {}
    if labelling.objective == "token_classification" and "add_prefix_space" in splitter:
        splitter["add_prefix_space"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _chunk(
    records: Sequence[Labelled | BadRow], backend: "Tokenizer", cfg: Data, labelling: Labelling
) -> Chunk:
    rows: list[TokenRow] = []
    owners: list[int] = []
    counts: list[dict[str, int]] = []
    bad: list[str] = []
    overlong: list[str] = []
    made = _encoded(records, backend, labelling)
    for owner, record, (encoding, marks), count in counted(made, counts, bad):
        if encoding.overflowing and cfg.overlong == "error":
            overlong.append(record.origin)
        if encoding.overflowing:
            count["truncated" if cfg.overlong == "truncate_right" else "dropped"] = 1
        if encoding.overflowing and cfg.overlong != "truncate_right":
            continue
        if not marks.places:
            count["untrained"] = 1
            continue
        pieces = _pieces(encoding, marks, cfg, labelling)
        count["split"] = max(len(pieces) - 1, 0)
        count["dropped"] += int(not pieces)
        rows += [_row(encoding, piece) for piece in pieces]
        owners += [owner] * len(pieces)
    return joined(rows, owners, counts, bad, overlong)._replace(
        types=np.concatenate([np.empty(0, TYPE), *(np.asarray(row.types) for row in rows)]),
        labels=np.concatenate(
            [np.empty((0, labelling.columns), LABEL), *(np.asarray(row.labels) for row in rows)]
        ),
    )


def _pieces(encoding: Any, marks: Marks, cfg: Data, labelling: Labelling) -> list[Piece]:
    """The rows of a record: one, or its windows, of which some hold the answer."""
    if not _has_windows(cfg, labelling):
        return [Piece(np.arange(len(encoding.ids)), marks)]
    found = []
    for kept in windows(encoding, cfg.max_seq_len, cfg.window_overlap):
        holds = np.isin(marks.places, kept).all()
        places = np.searchsorted(kept, marks.places).tolist()
        found.append(Piece(kept, Marks(places, marks.labels) if holds else _NOWHERE))
    return found


def _row(encoding: Any, piece: Piece) -> TokenRow:
    kept, marks = piece
    trained = np.zeros(len(kept), bool)
    trained[marks.places] = True
    tokens, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.uint8)
    return TokenRow(tokens[kept], trained, types[kept], marks.labels)


def _encoded(
    records: Sequence[Labelled | BadRow], backend: "Tokenizer", labelling: Labelling
) -> Iterator[tuple[Labelled | BadRow, Any]]:
    """Each record with its encoding and marks; one whose labels are wrong has become a bad row."""
    good = [record for record in records if not isinstance(record, BadRow)]
    inputs: list[Any] = [_input(record) for record in good]
    words = labelling.objective == "token_classification"
    encodings = iter(backend.encode_batch(inputs, is_pretokenized=words))
    for record in records:
        if isinstance(record, BadRow):
            yield record, None
            continue
        encoding = next(encodings)
        try:
            yield record, (encoding, _marks(record, encoding, labelling))
        except RowError as error:
            yield BadRow(record.origin, error.field, error.reason), None


def _input(record: Labelled) -> Any:
    if isinstance(record, Tagged):
        return list(record.words)
    if isinstance(record, Extractive):
        return record.question, record.context
    return record.texts[0] if len(record.texts) == 1 else record.texts


def _marks(record: Labelled, encoding: Any, labelling: Labelling) -> Marks:
    """Where the labels of a record are in its tokens; nowhere if it has none or they are cut off.

    Raises:
        RowError: a label is none of those there are.
    """
    if isinstance(record, Classified):
        label = labelling.numbers_of(record.label)
        last = len(encoding.ids) - 1
        places = [last if labelling.at_end else 0] if last >= 0 else []
        return Marks(places, label[None])
    if isinstance(record, Tagged):
        classes = np.array([labelling.class_of(tag) for tag in record.tags], np.float32)
        words = encoding.word_ids
        firsts = [i for i, w in enumerate(words) if w is not None and (not i or w != words[i - 1])]
        return Marks(firsts, classes[[words[i] for i in firsts], None])
    return _span(record, encoding)


def _span(record: Extractive, encoding: Any) -> Marks:
    """The tokens where an answer starts and ends."""
    if record.start < 0:
        return _NOWHERE
    first, last = record.start, record.start + len(record.answer) - 1
    start, end = (encoding.char_to_token(place, 1) for place in (first, last))
    if start is None or end is None:
        return Marks([], np.zeros((0, 2), np.float32))
    if start == end:
        return Marks([start], np.ones((1, 2), np.float32))
    return Marks([start, end], np.eye(2, dtype=np.float32))
