import numpy as np
import pytest

from jaxtune.data.batch import TokenRow
from jaxtune.data.packing import pack, stack_rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lookahead", [1, 8, 512])
def test_every_example_is_placed_once_and_fits(seed, lookahead):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, 400).tolist()
    order = rng.permutation(400).tolist()
    rows = pack(lengths, order, 64, lookahead)
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert rows == pack(lengths, order, 64, lookahead)


def test_little_is_left_empty_and_the_order_is_kept_roughly():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.4, 4000), 20, 1024).astype(int).tolist()
    order = rng.permutation(4000).tolist()
    rows = pack(lengths, order, 1024)
    assert 1 - sum(lengths) / (len(rows) * 1024) < 0.005
    place = {index: at for at, index in enumerate(order)}
    moves = [abs(place[i] - at) for at, i in enumerate(i for row in rows for i in row)]
    assert max(moves) < 512 and np.mean(moves) < 50


def test_rows_are_filled_from_the_oldest_that_fit():
    assert pack([4, 5, 3, 3, 1, 6], [0, 1, 2, 3, 4, 5], 10) == [[0, 2, 3], [1, 4], [5]]
    assert pack([], [], 10) == []
    assert pack([10, 10], [1, 0], 10) == [[1], [0]]


def test_stack_rows_isolates_examples():
    a = TokenRow(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    b = TokenRow(np.array([8, 9], np.int32), np.array([False, True]))
    batch = stack_rows([[a, b], [], [b]], 6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6, [8, 9, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    # The first token of an example is never a target: nothing precedes it.
    assert batch.weights.tolist() == [[0, 0, 1, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    dtypes = [x.dtype for x in (batch.tokens, batch.positions, batch.segment_ids, batch.weights)]
    assert dtypes == [np.int32, np.int32, np.int32, np.float32]
