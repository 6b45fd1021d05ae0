"""Several sources -> the records of one training set, in a deterministic order.

Only numbers are mixed here: from the sizes of the sources follows a list of (source, row) pairs.
`interleave` draws the next row's source with the given probabilities until the first source is
used up (`interleave_under`), until each was used up once, starting again with those that end
earlier (`interleave_over`), or until all are used up, none twice (`interleave_once`). Without
probabilities sources take turns, in whole rounds. Draws are those of
`datasets.interleave_datasets`, so a seed gives the same rows as there.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxtune.errors import ConfigError, DataError
from jaxtune.schema import Data

DRAWS = 1000  # sources drawn at a time; part of what makes the order that of `datasets`

Pair = tuple[int, int]  # source, row in it


def mixed(
    records: Sequence[np.ndarray], num_samples: Sequence[int | None], cfg: Data, seed: int
) -> np.ndarray:
    """The records of a training set in their order, as data.mix and its companions say.

    Args:
        records: of each source, the numbers of its records.
        num_samples: of each source, how many to draw (see `sample`).
        cfg: the data section of the config.
        seed: of the draws.

    Raises:
        ConfigError: data.weights, repeats or max_samples do not fit the number of sources.
        DataError: a source that is to be interleaved is empty.
    """
    count = len(records)
    weights = _for_each(cfg.weights, count, "weights")
    repeats = _for_each(cfg.repeats, count, "repeats") or (1.0,) * count
    limits = _for_each(cfg.max_samples, count, "max_samples") or (None,) * count
    chosen = [
        rows[
            sample(
                len(rows),
                max_samples=limits[source],
                num_samples=num_samples[source],
                repeat=repeats[source],
                seed=seed + source,
            )
        ]
        for source, rows in enumerate(records)
    ]
    if cfg.mix == "concatenate":
        return np.concatenate(chosen)
    pairs = mix([len(rows) for rows in chosen], cfg.mix, weights, seed)
    return np.array([chosen[source][row] for source, row in pairs], np.int64)


def considered(usable: np.ndarray, sizes: Sequence[int], cfg: Data) -> np.ndarray:
    """Which records come before the end of data.max_samples usable ones of their source, bool [E].

    Args:
        usable: bool [E], the records of one source after the other.
        sizes: records of each source.
        cfg: the data section of the config.
    """
    limits = _for_each(cfg.max_samples, len(sizes), "max_samples")
    if not limits:
        return np.ones(len(usable), bool)
    parts = np.split(usable, np.cumsum(sizes)[:-1])
    pairs = zip(parts, limits, strict=True)
    return np.concatenate([np.cumsum(part) - part < limit for part, limit in pairs])


def _for_each(given: tuple, count: int, name: str) -> tuple:
    """One value for each source: as many as there are, or one for all."""
    if len(given) == 1:
        return given * count
    if given and len(given) != count:
        raise ConfigError(
            f"data.{name} has {len(given)} values for {count} sources - give one for each, or one"
        )
    return given


def sample(
    size: int, *, max_samples: int | None, num_samples: int | None, repeat: float, seed: int
) -> np.ndarray:
    """The rows of one source that take part, as indices (int64).

    Args:
        size: rows of the source.
        max_samples: only the first so many are considered.
        num_samples: draw so many: a permutation's beginning, and once more where they do not
            suffice (LLaMA-Factory's num_samples).
        repeat: how often the rows appear; a fraction of a repeat is a random part of them.
        seed: of all draws.
    """
    rows = np.arange(size if max_samples is None else min(size, max_samples))
    random = np.random.default_rng(seed)
    if num_samples is not None and len(rows):
        rows = np.concatenate(
            [random.permutation(rows) for _ in range(-(-num_samples // len(rows)))]
        )[:num_samples]
    whole, part = int(repeat), repeat - int(repeat)
    some = np.sort(random.permutation(len(rows))[: round(part * len(rows))])
    return np.concatenate([np.tile(rows, whole), rows[some]])


def mix(sizes: Sequence[int], how: str, weights: Sequence[float], seed: int) -> list[Pair]:
    """The order in which rows of several sources are interleaved.

    Args:
        sizes: rows of each source.
        how: "interleave_under", "interleave_over" or "interleave_once".
        weights: of the sources, in any unit; empty: they take turns.
        seed: of the draws.

    Raises:
        DataError: a source that is to be interleaved is empty.
    """
    if not all(sizes):
        raise DataError(f"source {list(sizes).index(0) + 1} of data.mix={how} has no usable row")
    pairs: list[Pair] = []
    next_row, done = [0] * len(sizes), [False] * len(sizes)
    for source in _sources(len(sizes), weights, seed):
        if how == "interleave_once" and done[source]:
            continue
        pairs.append((source, next_row[source]))
        next_row[source] += 1
        if next_row[source] == sizes[source]:
            next_row[source], done[source] = 0, True
        enough = any(done) if how == "interleave_under" else all(done)
        if enough and (weights or source + 1 == len(sizes) or how == "interleave_once"):
            break
    return pairs


def _sources(count: int, weights: Sequence[float], seed: int) -> Iterator[int]:
    """The source of each next row, without end."""
    if not weights:
        while True:
            yield from range(count)
    share = np.asarray(weights, np.float64) / np.sum(weights)
    random = np.random.default_rng(seed)
    while True:
        yield from random.choice(count, size=DRAWS, p=share).tolist()
