import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from jaxtune.data import Dataset, Stats, TokenRow, make_loader
from jaxtune.data.ahead import ahead
from jaxtune.data.table import table_of
from jaxtune.errors import DataError, WeightError
from jaxtune.schema import Data

PACKED = Data(max_seq_len=64, packing=True)
CONCAT = Data(max_seq_len=64, packer="concat")
PADDED = Data(max_seq_len=64, packing=False)


def made_dataset(count=37, seed=0, fingerprint="f"):
    """Row i consists of tokens 1000 * i + position, so batches can be read back."""
    lengths = np.random.default_rng(seed).integers(4, 40, count)
    rows = [
        TokenRow(np.arange(n, dtype=np.int32) + 1000 * i, np.arange(n) >= n // 2)
        for i, n in enumerate(lengths.tolist())
    ]
    return Dataset(table_of(rows), fingerprint, "t", Stats(), list)


def rows_in(batch):
    """The examples that a batch shows, as they lie in its segments."""
    arrays = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    for tokens, segments, positions, weights in zip(
        arrays.tokens, arrays.segment_ids, arrays.positions, arrays.weights, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            yield tokens[own], positions[own], weights[own]
        assert not weights[segments == 0].any()


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.shape == y.shape and (x == y).all(), a, b))


def take(loader, count, position=None):
    iterator = loader.batches(position)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


@pytest.mark.parametrize("cfg", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_epoch_shows_every_row_once_and_whole(cfg, accumulation):
    dataset = made_dataset()
    loader = make_loader(dataset, cfg, rows=2, accumulation=accumulation, seed=1)
    steps = loader.num_steps(1)
    whole = take(loader, 2 * steps)
    orders = []
    for epoch in range(2):
        seen = []
        for batch, _ in whole[epoch * steps : (epoch + 1) * steps]:
            assert batch.tokens.shape == (accumulation, 2, 64)
            for tokens, positions, weights in rows_in(batch):
                index = int(tokens[0]) // 1000
                row = dataset.rows[index]
                assert tokens.tolist() == row.tokens.tolist()
                assert positions.tolist() == list(range(len(tokens)))
                assert weights.tolist() == [0, *row.trained[1:].tolist()]
                seen.append(index)
        assert sorted(seen) == list(range(37))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_order_follows_seed_and_shuffle():
    def first(seed, **options):
        cfg = dataclasses.replace(PADDED, **options)
        loader = make_loader(made_dataset(), cfg, rows=8, seed=seed)
        return take(loader, 1)[0][0].tokens[0, :, 0].tolist()

    assert first(0) == first(0) != first(1)
    assert first(0, shuffle=False) == [1000 * i for i in range(8)]


@pytest.mark.parametrize("cfg", [PACKED, CONCAT, PADDED], ids=["packed", "concat", "padded"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_at_every_step_is_exact(cfg, prefetch):
    cfg = dataclasses.replace(cfg, prefetch=prefetch)

    def loader():
        return make_loader(made_dataset(), cfg, rows=2, accumulation=2, seed=3)

    count = loader().num_steps(2.5)
    whole = take(loader(), count + 1)
    positions = [None, *(position for _, position in whole)]
    for step in range(count + 1):
        rest = take(loader(), count + 1 - step, positions[step])
        for (batch, position), (again, position_again) in zip(whole[step:], rest, strict=True):
            assert equal(batch, again) and position == position_again
    samples = [0, *(position["samples"] for _, position in whole)]
    assert samples == sorted(samples)
    assert samples[loader().num_steps(1)] == 37 and samples[loader().num_steps(2)] == 74


@pytest.mark.parametrize("pad_to", ["max", "longest"])
@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0,), (2,), (1,), (3,)), ((0, 2), (1, 3))])
def test_held_rows_are_those_of_the_whole_batch(pad_to, shares):
    cfg = dataclasses.replace(PADDED, pad_to=pad_to, max_seq_len=256)
    options = {"rows": 4, "accumulation": 2, "seed": 5}
    whole = make_loader(made_dataset(), cfg, **options)
    parts = [make_loader(made_dataset(), cfg, **options, held=held) for held in shares]
    count = whole.num_steps(2)
    assert {part.num_steps(2) for part in parts} == {count}
    taken = [take(part, count) for part in parts]
    for step, (batch, position) in enumerate(take(whole, count)):
        for own, held in zip(taken, shares, strict=True):
            assert own[step][1] == position
            assert equal(own[step][0], jax.tree.map(lambda x, rows=held: x[:, list(rows)], batch))


def test_resume_with_another_batch_size_goes_on_with_the_rows_not_yet_seen():
    before = make_loader(made_dataset(), PADDED, rows=4, seed=1)
    position = take(before, 3)[-1][1]
    after = make_loader(made_dataset(), PADDED, rows=5, accumulation=2, seed=1)
    seen = [b for b, _ in take(before, 3)] + [b for b, _ in take(after, 3, position)]
    indices = [int(tokens[0]) // 1000 for batch in seen for tokens, _, _ in rows_in(batch)]
    assert sorted(indices) == list(range(37))


def test_num_steps():
    loader = make_loader(made_dataset(10), PADDED, rows=2, accumulation=2)
    steps = {epochs: loader.num_steps(epochs) for epochs in (0, 0.1, 0.5, 1, 1.4, 2, 30)}
    assert steps == {0: 0, 0.1: 1, 0.5: 2, 1: 3, 1.4: 5, 2: 6, 30: 90}


def test_another_tokenizer_data_or_seed_are_refused_unless_allowed():
    position = take(make_loader(made_dataset(), PACKED, rows=2), 2)[-1][1]
    other = make_loader(made_dataset(fingerprint="g"), PACKED, rows=2)
    with pytest.raises(DataError, match="training data or their options differ.*allow_change"):
        other.batches(position)
    with pytest.raises(DataError, match="train.seed=7 differs from the run's 0"):
        make_loader(made_dataset(), PACKED, rows=2, seed=7).batches(position)
    with pytest.raises(WeightError, match="the tokenizer or its chat template is not the run's"):
        make_loader(made_dataset(), PACKED, rows=2).batches({**position, "tokenizer": "u"})
    allowed = dataclasses.replace(PACKED, allow_change=True)
    changed = make_loader(made_dataset(5, fingerprint="g"), allowed, rows=2)
    # The position lies beyond the end of the smaller epoch: the next epoch begins.
    batch, after = take(changed, 1, {**position, "row": 1000})[0]
    assert after["epoch"] >= 1 and batch.segment_ids.any()


def test_longest_padding_rounds_up():
    cfg = dataclasses.replace(PADDED, max_seq_len=1000, pad_to="longest")
    row = TokenRow(np.zeros(70, np.int32), np.ones(70, bool))
    dataset = Dataset(table_of([row] * 3), "f", "t", Stats(), list)
    (batch, _), *_ = take(make_loader(dataset, cfg, rows=2), 1)
    assert batch.tokens.shape == (1, 2, 128)
    cfg = dataclasses.replace(cfg, max_seq_len=100)
    assert take(make_loader(dataset, cfg, rows=2), 1)[0][0].tokens.shape == (1, 2, 100)


@pytest.mark.parametrize("cfg", [PACKED, PADDED], ids=["packed", "padded"])
def test_one_pass_shows_every_row_once(cfg):
    cfg = dataclasses.replace(cfg, shuffle=False)
    batches = list(make_loader(made_dataset(), cfg, rows=4).one_pass())
    assert all(batch.tokens.shape == (4, 64) for batch in batches)
    seen = [int(tokens[0]) // 1000 for batch in batches for tokens, _, _ in rows_in(batch)]
    assert sorted(seen) == list(range(37))


def test_one_row_is_enough_for_any_batch_size():
    loader = make_loader(made_dataset(1), PACKED, rows=8, accumulation=2, held=(4, 5))
    batches = take(loader, 3)
    assert not any(batch.segment_ids.any() for batch, _ in batches)
    assert [position["epoch"] for _, position in batches] == [1, 2, 3]


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_runs_ahead_by_its_depth_and_ends_when_closed():
    made = []

    def produce():
        for item in itertools.count():
            made.append(item)
            yield item

    iterator = ahead(produce(), 3)
    assert next(iterator) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in the producer's hand
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert not prefetch_threads()
    assert list(ahead(iter(range(7)), 2)) == list(range(7))


def test_prefetch_passes_on_what_the_producer_raises():
    def produce():
        yield 1
        raise DataError("the file vanished")

    iterator = ahead(produce(), 2)
    assert next(iterator) == 1
    with pytest.raises(DataError, match="the file vanished"):
        next(iterator)
    assert not prefetch_threads()
