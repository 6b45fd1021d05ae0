"""Which examples share a row, and the arrays of a batch of such rows.

Packing looks at lengths only. Rows are filled from the (shuffled) order: the oldest waiting example
opens a row, then the longest waiting one that still fits is added, out of a window of `LOOKAHEAD`
examples. This is best-fit with a bound on how far an example can move: the order stays roughly the
shuffled one, and little is left empty because the window nearly always holds a length that fits.

Examples in a row are told apart by `segment_ids`; attention between them is masked by the model.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxtune.data.batch import TokenBatch, TokenRow

LOOKAHEAD = 512


def pack(
    lengths: Sequence[int], order: Sequence[int], capacity: int, lookahead: int = LOOKAHEAD
) -> list[list[int]]:
    """Groups examples into rows of at most `capacity` tokens, each example exactly once.

    Args:
        lengths: tokens of each example; none exceeds `capacity`.
        order: indices into `lengths`, in the order in which they should be seen.
        capacity: tokens of a row.
        lookahead: examples that wait to be placed at any time.

    Returns:
        For each row, the indices of its examples in the order of their places.
    """
    rows: list[list[int]] = []
    waiting: deque[int] = deque()  # places in `order`, oldest first
    by_length: list[tuple[int, int]] = []  # (length, -place): of equal lengths the oldest is last
    placed: set[int] = set()
    upcoming = iter(range(len(order)))
    while True:
        while len(by_length) < lookahead and (place := next(upcoming, None)) is not None:
            waiting.append(place)
            insort(by_length, (lengths[order[place]], -place))
        while waiting and waiting[0] in placed:
            placed.discard(waiting.popleft())
        if not waiting:
            return rows
        first = waiting.popleft()
        length = lengths[order[first]]
        del by_length[bisect_left(by_length, (length, -first))]
        row, left = [order[first]], capacity - length
        while fitting := bisect_right(by_length, (left, 0)):
            length, negative = by_length.pop(fitting - 1)
            placed.add(-negative)
            row.append(order[-negative])
            left -= length
        rows.append(row)


def stack_rows(rows: Sequence[Sequence[TokenRow]], length: int) -> TokenBatch:
    """Builds the arrays [B, T] of B rows, each of them a sequence of examples (may be empty).

    Args:
        rows: the examples of each row; together no longer than `length`.
        length: T.
    """
    shape = (len(rows), length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            end = start + len(example.tokens)
            tokens[b, start:end] = example.tokens
            positions[b, start:end] = np.arange(end - start)
            segment_ids[b, start:end] = segment
            weights[b, start + 1 : end] = example.trained[1:]
            start = end
    return TokenBatch(tokens=tokens, positions=positions, segment_ids=segment_ids, weights=weights)
