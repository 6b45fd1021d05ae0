"""A context that is too long for a row, in windows that overlap, each behind the whole question.

The windows are those that transformers' tokenizers make with `stride` (Devlin et al. 2018, arXiv
1810.04805, run on SQuAD with a `doc_stride`).
"""

from typing import Any

import numpy as np


def windows(encoding: Any, length: int, overlap: int) -> list[np.ndarray]:
    """Which tokens of an encoded pair are in each window, ascending; there are none if none fits.

    Args:
        encoding: of a question and a context, not cut; of the library tokenizers.
        length: most tokens of a window, special ones included.
        overlap: tokens of the context that a window has of the one before it; half of the context's
            at most.
    """
    everything = np.arange(len(encoding.ids))
    if len(everything) <= length:
        return [everything]
    inside = np.flatnonzero([number == 1 for number in encoding.sequence_ids])
    room = length - (len(everything) - len(inside))
    if room < 1:
        return []
    overlap = min(overlap, room // 2)
    before, after = everything[: inside[0]], everything[inside[-1] + 1 :]
    starts = range(0, max(len(inside) - overlap, 1), room - overlap)
    return [np.concatenate([before, inside[at : at + room], after]) for at in starts]
