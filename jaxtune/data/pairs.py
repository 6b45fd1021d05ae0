"""Sources and targets: rows for models that read one text and write another.

A row holds its source, which is not trained on, and behind it its target, which is; a batch has
them apart. Ids are those of a transformers tokenizer called with the text, cut at the limit; a
target always ends with EOS, whether the tokenizer puts it there or not.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.batch import PairBatch, TokenRow
from jaxtune.data.chunks import counted, joined
from jaxtune.data.examples import Example, Message
from jaxtune.data.rows import BadRow
from jaxtune.data.table import Chunk, TokenTable
from jaxtune.data.workers import batches_of
from jaxtune.errors import ConfigError
from jaxtune.schema import Data

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def source_text(messages: Sequence[Message]) -> str:
    """What a model reads before it answers: the texts of the messages, one below the other."""
    return "\n".join(message.content for message in messages)


def source_ids(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], limit: int | None = None
) -> list[int]:
    """Token ids of the source that waits for an answer, cut at `limit` as rows are."""
    found = tokenizer(source_text(messages), truncation=limit is not None, max_length=limit)
    return list(found.input_ids)


def make_chunks(
    records: Iterator[Example | BadRow], tokenizer: "PreTrainedTokenizerFast", cfg: Data
) -> Iterator[Chunk]:
    """Tokenizes records in order; what is too long is cut, dropped or refused (data.overlong).

    Raises:
        ConfigError: the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("the tokenizer has no EOS token to end a target - set model.tokenizer")
    closes = tokenizer("").input_ids[-1:] == [eos]
    of_sources = _cutting(tokenizer, cfg.max_seq_len)
    of_targets = _cutting(tokenizer, cfg.max_target_len - (not closes))
    end = np.array([] if closes else [eos], np.int32)
    for batch in batches_of(records):
        yield _chunk(batch, of_sources, of_targets, end, cfg.overlong)


def _cutting(tokenizer: "PreTrainedTokenizerFast", limit: int) -> "Tokenizer":
    """A copy of the tokenizer that cuts at a limit."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(limit)
    return backend


def _chunk(
    records: Sequence[Example | BadRow],
    of_sources: "Tokenizer",
    of_targets: "Tokenizer",
    end: np.ndarray,
    overlong: str,
) -> Chunk:
    rows: list[TokenRow] = []
    owners: list[int] = []
    counts: list[dict[str, int]] = []
    bad: list[str] = []
    refused: list[str] = []
    made = _encoded(records, of_sources, of_targets)
    for owner, record, (source, target), count in counted(made, counts, bad):
        if source.overflowing or target.overflowing:
            count["truncated" if overlong == "truncate_right" else "dropped"] = 1
            if overlong == "error":
                refused.append(f"{record.origin}: its source or its target")
            if overlong != "truncate_right":
                continue
        if not (record.has_answer and record.messages[-1].trained and source.ids):
            count["untrained"] = 1
            continue
        parts = np.array(source.ids, np.int32), np.append(np.array(target.ids, np.int32), end)
        trained = np.repeat([False, True], [len(part) for part in parts])
        rows.append(TokenRow(np.concatenate(parts), trained))
        owners.append(owner)
    return joined(rows, owners, counts, bad, refused)


def _encoded(
    records: Sequence[Example | BadRow], of_sources: "Tokenizer", of_targets: "Tokenizer"
) -> Iterator[tuple[Example | BadRow, Any]]:
    """Each record with the encodings of its source and its target; one without has become bad."""
    records = [_checked(record) for record in records]
    good = [record for record in records if isinstance(record, Example)]
    sources = of_sources.encode_batch([source_text(record.messages[:-1]) for record in good])
    targets = of_targets.encode_batch([record.messages[-1].content for record in good])
    encoded = zip(sources, targets, strict=True)
    for record in records:
        yield record, None if isinstance(record, BadRow) else next(encoded)


def _checked(record: Example | BadRow) -> Example | BadRow:
    """The record, or why it has no source and target."""
    if isinstance(record, BadRow):
        return record
    if len(record.messages) < 2:
        return BadRow(record.origin, "", "has no text before the answer to be its source")
    if record.tools or any(message.tool_calls for message in record.messages):
        return BadRow(record.origin, "tools", "need a chat template, which pairs do not have")
    return record


def stack_pairs(
    rows: Sequence[Sequence[TokenRow]],
    *,
    source_length: int,
    target_length: int,
    loss_weights: str = "tokens",
) -> PairBatch:
    """Builds the arrays of B rows, each of them one example or none.

    Args:
        rows: the examples.
        source_length, target_length: S and T.
        loss_weights: as for `packing.stack_rows`.
    """
    of_sources, of_targets = (len(rows), source_length), (len(rows), target_length)
    source, source_segments = (np.zeros(of_sources, np.int32) for _ in range(2))
    tokens, segment_ids = (np.zeros(of_targets, np.int32) for _ in range(2))
    weights = np.zeros(of_targets, np.float32)
    for b, row in enumerate(rows):
        for example in row:
            read, written = example.tokens[~example.trained], example.tokens[example.trained]
            source[b, : len(read)], source_segments[b, : len(read)] = read, 1
            tokens[b, : len(written)], segment_ids[b, : len(written)] = written, 1
            weights[b, : len(written)] = 1 / len(written) if loss_weights == "examples" else 1
    return PairBatch(source, source_segments, tokens, segment_ids, weights)


def longest(table: TokenTable, indices: Sequence[int]) -> tuple[int, int]:
    """The lengths of the longest source and the longest target of some rows."""
    targets = [int(np.count_nonzero(table[i].trained)) for i in indices]
    sources = [len(table[i].tokens) - target for i, target in zip(indices, targets, strict=True)]
    return max(sources), max(targets)
