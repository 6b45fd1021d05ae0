"""Which examples share a row, and the arrays of a batch of such rows.

A packer looks at lengths only and gives a `Plan`, the rows of a whole epoch. `PACKERS`:

* best_fit: the oldest waiting example opens a row; then, going through those that wait behind it,
  the set of sums that some of them reach is kept as the bits of an integer, until a sum fills the
  row exactly (after a dozen or two, mostly) or `LOOKAHEAD` examples have been looked at and the
  best sum is taken. Since the search stops at the first examples that do, an example stays near
  its place in the (shuffled) order.
* greedy: PaddleNLP's greedy zero padding. Of every `BUFFER` examples each goes to the open row with
  the most space left (worst fit), or opens one; ours begins with the longest.
* next_fit: PaddleNLP's zero padding. An example that does not fit closes the row.
* concat: all examples one after the other, cut every `capacity` tokens (pretraining).

Padding of 7473 rows of GSM8K in rows of 1024: 0.04 %, 2.9 % (in PaddleNLP's order 6.7 %), 11.6 %,
0.04 %.
"""

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.data.batch import TokenBatch, TokenRow
from jaxtune.data.table import TokenTable
from jaxtune.schema import Data

Rows = TokenTable | Sequence[TokenRow]

LOOKAHEAD = 512
BUFFER = 500


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of an epoch.

    Attributes:
        pieces: int64 [M, 3]: an example's index, and the first and last + 1 of its tokens.
        bounds: int64 [R + 1]: row r holds pieces bounds[r] to bounds[r + 1], in this order.
    """

    pieces: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """The pieces of one row."""
        first, last = self.bounds[index], self.bounds[index + 1]
        return [(i, start, stop) for i, start, stop in self.pieces[first:last].tolist()]

    def seen(self, row: int) -> int:
        """Examples that begin before a row."""
        return int(np.count_nonzero(self.pieces[: self.bounds[row], 1] == 0))


def best_fit(
    lengths: np.ndarray, order: Sequence[int], capacity: int, lookahead: int = LOOKAHEAD
) -> Plan:
    """Fills each row from `lookahead` waiting examples as well as they can.

    Args:
        lengths: int [N], tokens of each example, from 1 to `capacity`.
        order: indices into `lengths`, in the order in which they should be seen.
        capacity: tokens of a row.
        lookahead: examples that are considered for one row, at most.
    """
    rows: list[list[int]] = []
    window: list[int] = []  # examples that wait, oldest first
    waiting: list[int] = []  # and their lengths
    taken = 0
    while window or taken < len(order):
        fresh = list(order[taken : taken + lookahead - len(window)])
        window += fresh
        waiting += lengths[fresh].tolist()
        taken += len(fresh)
        chosen = _fill(waiting, capacity)
        rows.append([window[place] for place in chosen])
        for place in reversed(chosen):
            del window[place], waiting[place]
    return _of_whole(rows, lengths)


def _fill(lengths: Sequence[int], capacity: int) -> list[int]:
    """Places of the examples that fill a row best: the first, and others as early as possible."""
    left = capacity - lengths[0]
    within = (1 << (left + 1)) - 1
    reached = [1]  # reached[n]: bit s is set if some of the first n after the opener sum to s
    for length in lengths[1:]:
        if reached[-1] >> left & 1:
            break
        reached.append((reached[-1] | reached[-1] << length) & within)
    rest = reached[-1].bit_length() - 1
    chosen: list[int] = []
    for place in range(len(reached) - 1, 0, -1):
        if not reached[place - 1] >> rest & 1:
            chosen.append(place)
            rest -= lengths[place]
    return [0, *reversed(chosen)]


def greedy(lengths: np.ndarray, order: Sequence[int], capacity: int, buffer: int = BUFFER) -> Plan:
    """Worst fit among each `buffer` examples; arguments as those of `best_fit`."""
    rows: list[list[int]] = []
    for first in range(0, len(order), buffer):
        spaces: list[tuple[int, int]] = []  # heap of (-space left, number of the row)
        for index in sorted(order[first : first + buffer], key=lambda i: -lengths[i]):
            length = int(lengths[index])
            if spaces and -spaces[0][0] >= length:
                space, row = spaces[0]
                heapq.heapreplace(spaces, (space + length, row))
                rows[row].append(index)
            else:
                heapq.heappush(spaces, (length - capacity, len(rows)))
                rows.append([index])
    return _of_whole(rows, lengths)


def next_fit(lengths: np.ndarray, order: Sequence[int], capacity: int) -> Plan:
    """Each example joins the row before it or opens the next; arguments as of `best_fit`."""
    rows: list[list[int]] = []
    space = 0
    for index in order:
        length = int(lengths[index])
        if length > space:
            rows.append([])
            space = capacity
        rows[-1].append(index)
        space -= length
    return _of_whole(rows, lengths)


def concat(lengths: np.ndarray, order: Sequence[int], capacity: int) -> Plan:
    """Cuts the examples, one after the other, every `capacity` tokens; they may be longer."""
    indices = np.array(order, np.int64)
    ends = np.cumsum(lengths[indices], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    rows = np.arange(0, total, capacity)
    cuts = np.union1d(np.append(rows, total), ends)  # places where a piece begins or ends
    which = np.searchsorted(ends, cuts[:-1], side="right")
    begins = ends[which] - lengths[indices[which]]
    pieces = np.stack([indices[which], cuts[:-1] - begins, cuts[1:] - begins], axis=1)
    return Plan(pieces, np.append(np.searchsorted(cuts, rows), len(pieces)))


def _of_whole(rows: Sequence[Sequence[int]], lengths: np.ndarray) -> Plan:
    """The plan of rows that hold whole examples."""
    indices = np.array([index for row in rows for index in row], np.int64)
    pieces = np.stack([indices, np.zeros_like(indices), lengths[indices]], axis=1)
    return Plan(pieces, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))


PACKERS: dict[str, Callable[[np.ndarray, Sequence[int], int], Plan]] = {
    "best_fit": best_fit,
    "greedy": greedy,
    "next_fit": next_fit,
    "concat": concat,
}


def make_plan(lengths: np.ndarray, order: Sequence[int], cfg: Data) -> Plan:
    """The rows of examples in an order, packed as the config says, or one example each."""
    if not cfg.packing:
        return _of_whole([[index] for index in order], lengths)
    return PACKERS[cfg.packer](lengths, order, cfg.max_seq_len)


def cut_row(rows: Rows, plan: Plan, index: int, isolated: bool) -> list[TokenRow]:
    """The examples of a row, as one if they are not isolated; none behind the plan's end."""
    if index >= len(plan):
        return []
    cut = [_piece(rows[i], start, stop) for i, start, stop in plan.row(index)]
    if isolated:
        return cut
    tokens = np.concatenate([row.tokens for row in cut])
    return [TokenRow(tokens, np.concatenate([row.trained for row in cut]))]


def _piece(row: TokenRow, start: int, stop: int) -> TokenRow:
    """Some tokens of an example; one with labels is always whole."""
    if row.labels is not None:
        return row
    return TokenRow(row.tokens[start:stop], row.trained[start:stop])


def stack_rows(
    rows: Sequence[Sequence[TokenRow]],
    length: int,
    loss_weights: str = "tokens",
    label_columns: int = 0,
) -> TokenBatch:
    """Builds the arrays [B, T] of B rows, each of them a sequence of examples (may be empty).

    Examples in a row are told apart by `segment_ids`; the model masks attention between them.

    Args:
        rows: the examples of each row; together no longer than `length`.
        length: T.
        loss_weights: "tokens": each trained token weighs 1; "examples": those of an example share
            a weight of 1, so that the loss is a mean over examples.
        label_columns: C, of the labels of each example; 0: there are none.
    """
    shape = (len(rows), length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    labels = np.zeros((label_columns, *shape), np.float32)
    types = np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            end = start + len(example.tokens)
            tokens[b, start:end] = example.tokens
            positions[b, start:end] = np.arange(end - start)
            segment_ids[b, start:end] = segment
            trained = example.trained.astype(np.float32)
            if example.labels is None or example.types is None:
                trained[:1] = 0  # no token of its own example predicts it
            else:
                labels[:, b, start:end][:, example.trained] = example.labels.T
                types[b, start:end] = example.types
            shared = max(trained.sum(), 1) if loss_weights == "examples" else 1
            weights[b, start:end] = trained / shared
            start = end
    batch = TokenBatch(tokens=tokens, positions=positions, segment_ids=segment_ids, weights=weights)
    return dataclasses.replace(batch, types=types, labels=labels) if label_columns else batch
