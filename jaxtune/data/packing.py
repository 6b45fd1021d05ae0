"""Which examples share a row, and the arrays of a batch of such rows.

Packing looks at lengths only. The oldest waiting example opens a row; then, going through those
that wait behind it, the set of sums that some of them reach is kept as the bits of an integer,
until a sum fills the row exactly (after a dozen or two, mostly) or `LOOKAHEAD` examples have been
looked at and the best sum is taken. Rows become all but full (7099 rows of GSM8K at 1024 tokens:
0.02 % padding, 0.1 s), and since the search stops at the first examples that do, an example stays
near its place in the (shuffled) order.

Examples in a row are told apart by `segment_ids`; attention between them is masked by the model.
"""

from collections.abc import Sequence

import numpy as np

from jaxtune.data.batch import TokenBatch, TokenRow

LOOKAHEAD = 512


def pack(
    lengths: Sequence[int], order: Sequence[int], capacity: int, lookahead: int = LOOKAHEAD
) -> list[list[int]]:
    """Groups examples into rows of at most `capacity` tokens, each example exactly once.

    Args:
        lengths: tokens of each example, from 1 to `capacity`.
        order: indices into `lengths`, in the order in which they should be seen.
        capacity: tokens of a row.
        lookahead: examples that are considered for one row, at most.

    Returns:
        For each row, the indices of its examples in the order of their places.
    """
    rows: list[list[int]] = []
    window: list[int] = []  # examples that wait, oldest first
    taken = 0
    while window or taken < len(order):
        fresh = order[taken : taken + lookahead - len(window)]
        window += fresh
        taken += len(fresh)
        chosen = _fill([lengths[index] for index in window], capacity)
        rows.append([window[place] for place in chosen])
        for place in reversed(chosen):
            del window[place]
    return rows


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
