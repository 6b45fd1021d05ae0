import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.data import Dataset, Stats, make_loader
from jaxtune.data.batch import TokenRow
from jaxtune.data.packing import PACKERS, best_fit, concat, greedy, next_fit, stack_rows
from jaxtune.data.table import table_of
from jaxtune.schema import Data


def rows_of(plan):
    return [[piece[0] for piece in plan.row(r)] for r in range(len(plan))]


def gsm8k_like(count=4000):
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.2, 0.4, count), 20, 1024).astype(int)
    return lengths, random.permutation(count).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packer", PACKERS)
def test_every_token_is_placed_once_and_fits(seed, packer):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 400)
    order = random.permutation(400).tolist()
    plan = PACKERS[packer](lengths, order, 64)
    placed = [piece for r in range(len(plan)) for piece in plan.row(r)]
    shown = [(i, t) for i, start, stop in placed for t in range(start, stop)]
    assert len(shown) == lengths.sum() == len(set(shown))
    filled = [sum(stop - start for _, start, stop in plan.row(r)) for r in range(len(plan))]
    assert max(filled) <= 64 and min(filled) > 0
    if packer != "concat":
        assert all((start, stop) == (0, lengths[i]) for i, start, stop in placed)
    again = PACKERS[packer](lengths, order, 64)
    assert (plan.pieces == again.pieces).all() and (plan.bounds == again.bounds).all()
    seen = [plan.seen(r) for r in range(len(plan) + 1)]
    assert seen[0] == 0 and seen[-1] == 400 and seen == sorted(seen)
    assert len(PACKERS[packer](lengths, [], 64)) == 0


@pytest.mark.parametrize(
    ("packer", "most"),
    [("best_fit", 0.005), ("greedy", 0.04), ("next_fit", 0.15), ("concat", 1e-3)],
)
def test_little_is_left_empty_and_the_order_is_kept_roughly(packer, most):
    lengths, order = gsm8k_like()
    plan = PACKERS[packer](lengths, order, 1024)
    assert 1 - lengths.sum() / (len(plan) * 1024) < most
    place = {index: at for at, index in enumerate(order)}
    moves = [abs(place[i] - at) for at, i in enumerate(dict.fromkeys(plan.pieces[:, 0].tolist()))]
    assert max(moves) < 512 and np.mean(moves) < 250


def test_rows_are_filled_from_the_oldest_that_fit():
    lengths = np.array([4, 5, 3, 3, 1, 6])
    assert rows_of(best_fit(lengths, range(6), 10)) == [[0, 2, 3], [1, 4], [5]]
    assert rows_of(best_fit(np.array([10, 10]), [1, 0], 10)) == [[1], [0]]
    assert rows_of(best_fit(lengths, range(6), 10, lookahead=1)) == [[i] for i in range(6)]


def test_next_fit_closes_a_row_that_the_next_example_does_not_fit():
    assert rows_of(next_fit(np.array([4, 5, 3, 1, 7]), range(5), 10)) == [[0, 1], [2, 3], [4]]


def test_greedy_takes_the_row_with_the_most_space_left():
    lengths = np.array([7, 8, 5, 3, 2, 3])
    assert rows_of(greedy(lengths, range(6), 10)) == [[1, 4], [0, 5], [2, 3]]
    # Nothing joins a row of an earlier buffer.
    assert rows_of(greedy(lengths, range(6), 10, buffer=3)) == [[1], [0], [2], [3, 5, 4]]


def test_concat_cuts_long_examples_and_carries_their_tails():
    plan = concat(np.array([3, 12, 2]), [1, 0, 2], 5)
    assert [plan.row(r) for r in range(len(plan))] == [
        [(1, 0, 5)],
        [(1, 5, 10)],
        [(1, 10, 12), (0, 0, 3)],
        [(2, 0, 2)],
    ]
    assert [plan.seen(r) for r in range(5)] == [0, 1, 1, 2, 3]


def test_rows_that_are_not_isolated_are_one_segment():
    made = [TokenRow(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in (3, 4, 2)]
    dataset = Dataset(table_of(made), "f", "t", Stats(), list)
    cfg = Data(max_seq_len=8, packer="concat", shuffle=False, isolated=False)
    (first, second) = make_loader(dataset, cfg, rows=1).one_pass()
    assert first.tokens.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert first.positions.tolist() == [list(range(8))]
    assert first.segment_ids.tolist() == [[1] * 8]
    assert second.tokens[0, 0] == 1 and second.segment_ids.sum() == 1
    (apart, _) = make_loader(dataset, dataclasses.replace(cfg, isolated=True), rows=1).one_pass()
    assert apart.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert jax.tree.all(jax.tree.map(lambda x: x.shape == (1, 8), apart))


def test_examples_can_share_a_weight_of_one():
    a = TokenRow(np.arange(5, dtype=np.int32), np.array([False, True, True, True, True]))
    b = TokenRow(np.arange(3, dtype=np.int32), np.array([False, False, True]))
    none = TokenRow(np.arange(2, dtype=np.int32), np.array([True, False]))
    batch = stack_rows([[a, b, none]], 12, "examples")
    assert batch.weights.tolist() == [[0, 0.25, 0.25, 0.25, 0.25, 0, 0, 1, 0, 0, 0, 0]]


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
