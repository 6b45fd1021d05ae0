"""A stream shows every row once an epoch, whoever reads it, and goes on exactly."""

import dataclasses
import itertools
import json
import random

import jax
import numpy as np
import pytest

from jaxtune.data import load, load_tokenizer, make_loader, stream
from jaxtune.errors import DataError, WeightError
from jaxtune.schema import Data

CFG = Data(max_seq_len=128, streaming=True, shuffle_units=2, prefetch=0)


def alpaca(index):
    return {"instruction": f"q{index:04}", "output": "word " * (index % 9 + 1)}


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(stream, "UNIT", 400)


@pytest.fixture
def files(write_rows, small_units):
    """Two files of JSON lines and an array: 70, 45 and 5 rows."""
    array = json.dumps([alpaca(i) for i in range(115, 120)]).encode()
    return (
        write_rows(map(alpaca, range(70)), "a.jsonl"),
        write_rows(map(alpaca, range(70, 115)), "b.jsonl"),
        write_rows([array], "c.json"),
    )


def opened(tokenizer, files, **options):
    cfg = dataclasses.replace(CFG, train=tuple(files), **options)
    return load(cfg, tokenizer, seed=0, vocab_size=259)[0]


def take(loader, count, position=None):
    iterator = loader.batches(position)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def numbers_in(batch, tokenizer):
    """The numbers of the questions that a batch shows."""
    arrays = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    for tokens, segments in zip(arrays.tokens, arrays.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            text = tokenizer.decode(tokens[segments == segment])
            yield int(text.partition("user\nq")[2][:4])


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.shape == y.shape and (x == y).all(), a, b))


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_epoch_shows_every_row_once(byte_tokenizer, files, lanes):
    source = opened(byte_tokenizer, files, max_seq_len=256)
    assert len(source.units) > 20 and "streamed" in source.stats and source.mean_length > 40
    shown = []
    windows = range(-(-len(source.units) // (CFG.shuffle_units * lanes)))
    for lane, window in itertools.product(range(lanes), windows):
        first = (window * lanes + lane) * CFG.shuffle_units
        left = len(source.units) - first
        table = source.read(first, max(min(CFG.shuffle_units, left), 0), seed=3) if left > 0 else []
        shown += [byte_tokenizer.decode(row.tokens).partition("user\nq")[2][:4] for row in table]
    assert sorted(map(int, shown)) == list(range(120)) and len(windows) > 3


def test_lanes_show_whole_rows_of_all_files_mixed(byte_tokenizer, files):
    loader = make_loader(opened(byte_tokenizer, files, max_seq_len=256), CFG, rows=2, seed=1)
    seen = [n for batch, _ in take(loader, 30) for n in numbers_in(batch, byte_tokenizer)]
    assert set(seen) == set(range(120))
    ordered = opened(byte_tokenizer, files, max_seq_len=256, shuffle=False, packing=False)
    one = make_loader(ordered, ordered.cfg, rows=1)
    seen = [n for batch, _ in take(one, 130) for n in numbers_in(batch, byte_tokenizer)]
    assert seen == [*range(120), *range(10)]


@pytest.mark.parametrize(
    ("packer", "shards"),
    [
        ("best_fit", ((0, 1, 2, 3),)),
        ("greedy", ((0, 1), (2, 3))),
        ("concat", ((2,), (0,), (3,), (1,))),
    ],
)
def test_killed_anywhere_the_rest_is_the_same(byte_tokenizer, files, shards, packer):
    """20 random points of a mixed, shuffled, packed stream, read by 1, 2 and 4 processes."""
    options = {"rows": 4, "accumulation": 2, "seed": 5}
    source = opened(byte_tokenizer, files, packer=packer)
    whole = take(make_loader(source, source.cfg, **options), 40)
    parts = [make_loader(source, source.cfg, **options, held=held) for held in shards]
    taken = [take(part, 40) for part in parts]
    for step, (batch, _) in enumerate(whole):
        for own, held in zip(taken, shards, strict=True):
            assert equal(own[step][0], jax.tree.map(lambda x, at=held: x[:, list(at)], batch))
    for step in random.Random(0).sample(range(1, 38), 20):
        positions = [part.whole(own[step - 1][1]) for part, own in zip(parts, taken, strict=True)]
        lanes = {lane: state for position in positions for lane, state in position["lanes"].items()}
        saved = json.loads(json.dumps({**positions[0], "lanes": lanes}))
        # Another number of processes goes on: lanes belong to rows, not to processes.
        rest = take(make_loader(source, source.cfg, **options), 2, saved)
        for (again, _), (batch, _) in zip(rest, whole[step:], strict=False):
            assert equal(again, batch)


def test_threads_change_nothing(byte_tokenizer, files):
    plain = opened(byte_tokenizer, files)
    ahead = opened(byte_tokenizer, files, prefetch=2)
    options = {"rows": 3, "seed": 2}
    pairs = zip(
        take(make_loader(plain, plain.cfg, **options), 25),
        take(make_loader(ahead, ahead.cfg, **options), 25),
        strict=True,
    )
    assert all(equal(a[0], b[0]) for a, b in pairs)


def test_concat_shows_every_token_once_through_its_carries(byte_tokenizer, files):
    source = opened(byte_tokenizer, files, packer="concat", shuffle=False)
    expected = np.concatenate([row.tokens for row in source.read(0, len(source.units), 0)])
    shown = np.concatenate(
        [b.tokens.ravel() for b, _ in take(make_loader(source, source.cfg, rows=1), 60)]
    )
    length = min(len(shown), len(expected))
    assert length > 5000 and (shown[:length] == expected[:length]).all()
    segments = np.concatenate(
        [b.segment_ids.ravel() for b, _ in take(make_loader(source, source.cfg, rows=1), 60)]
    )
    assert segments.all()  # no padding at all


def test_changes_are_detected(byte_tokenizer, files, write_rows):
    source = opened(byte_tokenizer, files)
    loader = make_loader(source, source.cfg, rows=2)
    position = loader.whole(take(loader, 3)[-1][1])
    with pytest.raises(DataError, match="dealt to 2 rows of a batch, not 4"):
        make_loader(source, source.cfg, rows=4).batches(position)
    with pytest.raises(WeightError, match="the tokenizer or its chat template"):
        vicuna = load_tokenizer("tiny:llama", template="vicuna")
        other = opened(vicuna, files, max_seq_len=512)
        make_loader(other, other.cfg, rows=2).batches(position)
    rows = [alpaca(i) for i in range(70)]
    rows[33]["output"] = "W" + rows[33]["output"][1:]
    write_rows(rows, "a.jsonl")
    changed = opened(byte_tokenizer, files)
    with pytest.raises(DataError, match="training data or their options differ"):
        make_loader(changed, changed.cfg, rows=2).batches(position)


def test_bad_rows_are_named_when_they_are_met(byte_tokenizer, write_rows, small_units):
    rows = [*map(alpaca, range(40)), b"{oops", *map(alpaca, range(40))]
    source = opened(byte_tokenizer, [write_rows(rows)], shuffle=False)
    with pytest.raises(DataError, match=r"rows.jsonl@\d+:\d+: column 2: invalid JSON"):
        take(make_loader(source, source.cfg, rows=1), 60)
    skipping = {"on_bad_row": "skip", "max_bad_fraction": 0.2, "shuffle": False}
    source = opened(byte_tokenizer, [write_rows(rows)], **skipping)
    assert len(take(make_loader(source, source.cfg, rows=1), 60)) == 60


def test_what_cannot_be_streamed_is_refused(byte_tokenizer, write_rows, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        opened(byte_tokenizer, [str(tmp_path / "nothing.jsonl")])
    with pytest.raises(DataError, match="no usable row"):
        opened(byte_tokenizer, [write_rows([{**alpaca(0), "output": " "}])])
    monkeypatch.setattr(stream, "LARGEST", 10)
    with pytest.raises(DataError, match="split it, or set data.streaming=false"):
        opened(byte_tokenizer, [write_rows([b"[1, 2, 3, 4, 5]"])])


def test_lines_longer_than_a_unit_are_read_once(byte_tokenizer, write_rows, monkeypatch):
    monkeypatch.setattr(stream, "UNIT", 50)
    source = opened(byte_tokenizer, [write_rows(map(alpaca, range(20)))])
    table = source.read(0, len(source.units), 0)
    assert len(table) == 20


def test_options_that_change_rows_are_detected(byte_tokenizer, files, tmp_path, monkeypatch):
    module = tmp_path / "stream_function.py"
    module.write_text("def same(row):\n    return row\n\n\ndef other(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(**options):
        return opened(byte_tokenizer, files, **options).fingerprint

    base = fingerprint(function="stream_function:same")
    columns = ("instruction=output", "output=output")
    changed = [
        *(fingerprint(), fingerprint(columns=columns), fingerprint(text_rows="file")),
        *(fingerprint(max_source_len=9), fingerprint(max_line_bytes=2048)),
        fingerprint(function="stream_function:other"),
    ]
    assert base not in changed and len(set(changed)) == len(changed)
    # What stops a run may be changed to go on with it: the rows it showed are the same.
    skip = {"on_bad_row": "skip", "max_bad_fraction": 0.5, "function": "stream_function:same"}
    assert base == fingerprint(**skip)
    module.write_text("def same(row):\n    return {**row}\n")
    assert base != fingerprint(function="stream_function:same")


def test_the_share_of_bad_rows_is_that_of_all_read(byte_tokenizer, write_rows, small_units):
    rows = [*map(alpaca, range(40)), b"{oops", b"{again", *map(alpaca, range(40))]
    skip = {"on_bad_row": "skip", "shuffle": False}
    source = opened(byte_tokenizer, [write_rows(rows)], max_bad_fraction=0.01, **skip)
    tables = [source.read(n, 1, 0) for n in range(len(source.units))]
    assert sum(map(len, tables)) == 80  # 2 of the few rows of a unit
    with pytest.raises(DataError, match=r"10 of 410 rows are bad, more than"):
        source.read(0, 4 * len(source.units), 0)
    with pytest.raises(DataError, match="1 of|2 of"):
        source = opened(byte_tokenizer, [write_rows(rows)], max_bad_fraction=0.0, **skip)
        source.read(0, len(source.units), 0)


def test_the_first_row_of_a_file_shows_the_format_of_all_units(
    byte_tokenizer, write_rows, small_units
):
    other = [{"prompt": f"q{i:04}", "completion": "word"} for i in range(10)]
    path = write_rows([b"{oops", *map(alpaca, range(20)), *other])
    skip = {"on_bad_row": "skip", "max_bad_fraction": 0.5, "shuffle": False}
    source = opened(byte_tokenizer, [path], **skip)
    assert {unit.source.format for unit in source.units} == {"alpaca"}
    assert len(source.read(0, len(source.units), 0)) == 20
    (unit,) = opened(byte_tokenizer, [write_rows([alpaca(0)], "one")], **skip).units
    assert unit.source.format == "auto"
