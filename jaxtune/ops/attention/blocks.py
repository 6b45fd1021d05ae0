"""Which blocks of a mask hold anything to see: what the kernels visit.

Queries and keys are cut into blocks; `seen_blocks` bounds, from positions and from the smallest and
largest segment id and interval end of each block, which pairs of blocks can be skipped and which
need no elementwise mask. It is exact for positions (causal, window, prefix, offset) and for packed
rows in which segments follow one another; in other rows it may keep a block that is empty, never
drop one that is not. Bounds over the intervals of FlashMask as in arXiv 2410.01359, section 4.2.

Cost: a few operations on [B, blocks of queries, blocks of keys], on the host where positions alone
decide.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.ops.attention.mask import Mask, visible

# Bits of a step's word, see `walk`.
FIRST, LAST, RUN, PARTLY, WRITE = 1, 2, 4, 8, 16
_FLAGS, _INDEX = 5, 13
LARGEST = 2**_INDEX  # blocks on either axis

Array = Any  # numpy on the host, jax.Array under a trace


def seen_blocks(
    mask: Mask,
    query_offset: int | jax.Array,
    lengths: tuple[int, int],
    sizes: tuple[int, int],
) -> tuple[Array, Array]:
    """Which pairs of blocks hold a visible pair, and in which every pair is visible.

    Args:
        mask: the mask.
        query_offset: position of the first query.
        lengths: T and S, not padded.
        sizes: queries and keys in a block; the last block may be cut by the end of the axis.

    Returns:
        Booleans [B, T blocks, S blocks] (1 instead of B where rows do not differ): `some` is False
        only where nothing is visible, `all` is True only where everything is, which it never is
        for a block of keys that goes beyond S. numpy arrays if nothing about them is traced.
    """
    on_host = isinstance(query_offset, int) and mask.columns is None
    on_host = on_host and mask.query_segments is None
    xp: Any = np if on_host else jnp
    (t, s), (block_q, block_k) = lengths, sizes
    start_q, start_k = np.arange(0, t, block_q), np.arange(0, s, block_k)
    end_k = np.minimum(start_k + block_k, s)  # the ends are exclusive
    first = xp.asarray(start_q)[:, None] + query_offset
    last = xp.asarray(np.minimum(start_q + block_q, t) - 1)[:, None] + query_offset
    # Prefix keys apart: the rest of a block of keys has positions low to high, if any.
    low = (np.maximum(start_k, mask.prefix) - mask.prefix)[None]
    high = (end_k - 1 - mask.prefix)[None]
    some, every = (xp.asarray(low <= high) & (first <= last) for _ in range(2))
    if mask.causal:
        some &= last >= low
        every &= first >= high
    if mask.window is not None:
        some &= first - high < mask.window
        every &= last - low < mask.window
        if not mask.causal:
            some &= low - last < mask.window
            every &= high - first < mask.window
    some, every = some[None], every[None]
    whole = np.arange(s)[None] >= mask.prefix  # keys that the rest of the mask applies to
    if mask.query_segments is not None and mask.key_segments is not None:
        meet, same = _segments(mask.query_segments, mask.key_segments, whole, sizes)
        some, every = some & meet, every & same
    if mask.columns is not None:
        c = mask.columns
        above = jnp.zeros_like(c.ute) if c.ute is not None and c.uts is None else c.uts
        for start, end in ((c.lts, c.lte), (above, c.ute)):
            if start is not None:
                hidden, touched = _interval(start, end, whole, block_k, (first, last))
                some, every = some & ~hidden, every & ~touched
    if mask.prefix:
        some = some | (start_k < mask.prefix)
        every = every | (low > high)
    return some, every & ((start_k + block_k) <= s)


def _blocked(array: jax.Array, size: int, fill: jax.Array) -> jax.Array:
    """[B, L] -> [B, blocks, size], the last one padded with fill."""
    padded = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size)), constant_values=fill)
    return padded.reshape(array.shape[0], -1, size)


def _range(array: jax.Array, size: int, counts: np.ndarray | bool) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value [B, blocks] of each block among the elements that count."""
    info = jnp.iinfo(array.dtype)
    least, most = (jnp.asarray(x, array.dtype) for x in (info.min, info.max))
    low = _blocked(jnp.where(counts, array, most), size, most).min(axis=-1)
    high = _blocked(jnp.where(counts, array, least), size, least).max(axis=-1)
    return low, high


def _segments(
    queries: jax.Array, keys: jax.Array, whole: np.ndarray, sizes: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Whether ranges of ids overlap, and whether they are one and the same id."""
    meet, same = jnp.bool_(True), jnp.bool_(True)
    # Padding has id 0 and follows the ids 1, 2, ...: a block of both spans all ids in signed order,
    # but not in an order that puts 0 (or -1) last. Ranges must overlap in either order.
    for order in (lambda x: x, lambda x: (x - 1).astype(jnp.uint32)):
        low_q, high_q = (x[:, :, None] for x in _range(order(queries), sizes[0], True))
        low_k, high_k = (x[:, None, :] for x in _range(order(keys), sizes[1], whole))
        meet = meet & (low_q <= high_k) & (low_k <= high_q)
        same = same & (low_q == high_k) & (low_k == high_q)
    return meet, same


def _interval(
    start: jax.Array,
    end: jax.Array | None,
    whole: np.ndarray,
    block_k: int,
    positions: tuple[Array, Array],
) -> tuple[jax.Array, jax.Array]:
    """Whether [start, end) hides all queries from all keys of a block, and whether it hides any."""
    first, last = (jnp.asarray(x)[None] for x in positions)
    low, high = (x[:, None, :] for x in _range(start, block_k, whole))
    hidden, untouched = high <= first, low > last
    if end is not None:
        low, high = (x[:, None, :] for x in _range(end, block_k, whole))
        hidden, untouched = hidden & (low > last), untouched | (high <= first)
    return hidden, ~untouched


def walk(some: Array, every: Array, *, writes: int = 0) -> tuple[Array, Array]:
    """The steps of a kernel that walks over the seen blocks, query block after query block.

    Every query block gets at least one step, so that its result is written; one that sees nothing
    gets a step without RUN.

    Args:
        some, every: booleans [B or 1, T blocks, S blocks] of `seen_blocks`.
        writes: so many steps follow, with flag WRITE and key block 0, 1, ...

    Returns:
        steps: int32 [B or 1, steps], rows as long as if every block were seen. A step is one word:
            its query block, its key block and flags, see `unpack`. FIRST and LAST: of its query
            block; RUN: there is something to see; PARTLY: not everything is visible.
        count: int32 scalar, steps of the longest row; shorter ones end in steps without flags,
            which repeat the blocks of their last one.

    Raises:
        NotImplementedError: there are too many blocks for a word.
    """
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    rows, queries, keys = some.shape
    if max(queries, keys) > LARGEST:
        raise NotImplementedError(f"{queries} x {keys} blocks, over {LARGEST}: use larger ones")
    blind = ~some.any(axis=-1, keepdims=True) & (np.arange(keys) == 0)
    visits = (some | blind).reshape(rows, -1)
    # A stable sort that puts visited pairs first keeps their order.
    order = xp.argsort(~visits, axis=-1, stable=True)
    counts = visits.sum(axis=-1, dtype=np.int32)[:, None]
    step = np.arange(queries * keys)[None]
    order = xp.where(step < counts, order, xp.take_along_axis(order, counts - 1, axis=-1))
    query, key = order // keys, order % keys
    change = query[:, 1:] != query[:, :-1]
    edge = np.ones((rows, 1), bool)
    run = xp.take_along_axis(some.reshape(rows, -1), order, axis=-1)
    partly = ~xp.take_along_axis(every.reshape(rows, -1), order, axis=-1)
    flags = FIRST * xp.concatenate([edge, change], axis=1)
    flags = flags + LAST * (xp.concatenate([change, edge], axis=1) | (step == counts - 1))
    flags = flags + RUN * run + PARTLY * (run & partly)
    steps = _pack(query, key, xp.where(step < counts, flags, 0))
    count = counts.max()
    if writes:
        tail = _pack(steps[:, -1:] >> (_FLAGS + _INDEX), np.arange(writes)[None], WRITE)
        place = np.arange(queries * keys + writes)[None]
        padded = xp.concatenate([steps, steps[:, -1:] * np.ones((1, writes), np.int32)], axis=1)
        moved = xp.take_along_axis(tail, xp.clip(place - count, 0, writes - 1), axis=1)
        steps = xp.where(place < count, padded, moved)
        count = count + writes
    return steps.astype(np.int32), count


def _pack(query: Array, key: Array, flags: Array | int) -> Array:
    return (query << (_FLAGS + _INDEX)) | (key << _FLAGS) | flags


def unpack(step: Any) -> tuple[Any, Any, Any]:
    """Query block, key block and flags of a step's word."""
    return step >> (_FLAGS + _INDEX), (step >> _FLAGS) & (LARGEST - 1), step & (2**_FLAGS - 1)


def least_blocks(
    mask: Mask, query_offset: int | jax.Array, lengths: tuple[int, int], sizes: tuple[int, int]
) -> np.ndarray:
    """Blocks that hold at least one visible pair, by looking at every pair: bool [B, ., .].

    What `seen_blocks` is compared with in tests and reports; memory grows with T S.
    """
    (t, s), (block_q, block_k) = lengths, sizes
    positions, keys = query_offset + jnp.arange(t)[:, None], jnp.arange(s)[None, :]
    batch = max([1, *(x.shape[0] for x in jax.tree.leaves(mask))])
    rows = []
    for b in range(batch):
        row = jax.tree.map(lambda x, b=b: np.asarray(x)[b : b + 1], mask)
        if row.query_segments is not None:
            row = dataclasses.replace(row, query_segments=row.query_segments.T)
        seen = visible(row, positions, keys)
        seen = np.broadcast_to(True if seen is None else np.asarray(seen), (t, s))
        padded = np.pad(seen, ((0, -t % block_q), (0, -s % block_k)))
        shape = (-(-t // block_q), block_q, -(-s // block_k), block_k)
        rows.append(padded.reshape(shape).any(axis=(1, 3)))
    return np.stack(rows)
