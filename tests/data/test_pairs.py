"""Rows of sources and targets: the tokenizer's ids, limits, what is left out, and batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxtune.data import Loader, PairBatch, load, load_tokenizer, source_ids
from jaxtune.data.examples import Message
from jaxtune.errors import DataError
from jaxtune.schema import Data

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say it.", "input": "one", "output": "uno"},
    {"instruction": "x" * 40, "output": "y" * 40},
    {"instruction": "empty", "output": " "},
]


@pytest.fixture(scope="module")
def t5_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer, with EOS behind every text as T5's has it."""
    from tokenizers import processors

    tokenizer = load_tokenizer("tiny:t5")
    eos = str(tokenizer.eos_token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {eos}", None, [(eos, tokenizer.eos_token_id)]
    )
    folder = tmp_path_factory.mktemp("t5")
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(str(folder), template="none")


def loaded(path: str, tokenizer: Any, **options: Any) -> Any:
    given = {"max_seq_len": 16, "max_target_len": 8, "packing": False} | options
    cfg = Data(train=(path,), cache="", **given)
    return cfg, load(cfg, tokenizer, seed=0, vocab_size=259, paired=True)[0]


def test_ids_are_those_of_the_tokenizer(t5_tokenizer: Any, write_rows: Callable[..., str]):
    cfg, found = loaded(write_rows(ROWS), t5_tokenizer)
    assert found.stats.truncated == 1 and found.stats.untrained == 1 and len(found.rows) == 2
    plain = load_tokenizer("tiny:t5")
    without_eos = loaded(write_rows(ROWS), plain)[1]
    texts = [("Say it.\none", "uno"), ("x" * 40, "y" * 40)]
    for row, other, (source, target) in zip(found.rows, without_eos.rows, texts, strict=True):
        ids = t5_tokenizer(source, truncation=True, max_length=16).input_ids
        assert row.tokens[~row.trained].tolist() == ids and len(ids) <= 16
        ids = t5_tokenizer(target, truncation=True, max_length=8).input_ids
        assert row.tokens[row.trained].tolist() == ids and len(ids) <= 8
        # A tokenizer that ends no text: sources stay as they are, targets end all the same.
        assert other.tokens[other.trained].tolist() == ids
        ids = plain(source, truncation=True, max_length=16).input_ids
        assert other.tokens[~other.trained].tolist() == ids
        assert source_ids(plain, [Message("user", source)], 16) == ids
    assert loaded(write_rows(ROWS), t5_tokenizer, overlong="drop")[1].stats.dropped == 1
    with pytest.raises(DataError, match="its source or its target"):
        loaded(write_rows(ROWS), t5_tokenizer, overlong="error")


def test_batches_have_sources_and_targets_apart(t5_tokenizer: Any, write_rows: Callable[..., str]):
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "f", "completion": "g" * 90}]
    options: dict[str, Any] = {"max_seq_len": 80, "max_target_len": 100, "shuffle": False}
    options["loss_weights"] = "examples"
    cfg, found = loaded(write_rows(rows), t5_tokenizer, **options, pad_to="longest")
    (batch,) = Loader(found, cfg, 3, 1, 0, (0, 1, 2)).one_pass()
    assert isinstance(batch, PairBatch)
    # Rounded up to 64; neither is longer than its limit.
    assert batch.source.shape == (3, 64) and batch.tokens.shape == (3, 100)
    assert batch.num_tokens == found.stats.tokens == 4 + 3 + 2 + 91
    assert batch.size == 3 * 164
    eos = t5_tokenizer.eos_token_id
    assert batch.source[0, :5].tolist() == [*t5_tokenizer("abc").input_ids, 0]
    assert batch.tokens[0, :4].tolist() == [*t5_tokenizer("de").input_ids, 0]
    assert batch.tokens[0, 2] == eos and batch.segment_ids.sum(axis=1).tolist() == [3, 91, 0]
    np.testing.assert_allclose(batch.weights.sum(axis=1), [1, 1, 0], rtol=1e-6)
    _, whole = loaded(write_rows(rows), t5_tokenizer, **options)
    (batch,) = Loader(whole, Data(**options, packing=False), 3, 1, 0, (0, 1, 2)).one_pass()
    assert batch.source.shape == (3, 80)


def test_rows_without_a_source_are_bad(t5_tokenizer: Any, write_rows: Callable[..., str]):
    with pytest.raises(DataError, match="has no text before the answer"):
        loaded(write_rows([{"text": "one"}]), t5_tokenizer)
