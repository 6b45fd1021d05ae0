"""Blockwise attention in plain XLA with a gradient by hand (FlashAttention-2, arXiv 2307.08691).

Scores exist only as tiles of some queries by some keys. One loop visits the tiles of which the
mask leaves anything (`blocks.seen_blocks`; for a batch, in any of its rows), with an online softmax
forward; the backward pass recomputes each tile from the log-sum-exp. Memory beyond operands and
results is copies of them, float32 sums as large as they are, one tile and the list of tiles.

Written for CPUs: the backward pass works on transposed tiles, whose products have no left operand
contracted over its leading axis, for which XLA for CPU has no fast kernel; and products ask for
float32 results, which bfloat16 needs for its fast kernel. A loop over tiles that stay in the cache
is faster there than an unrolled one, or than longer ones (forward and backward, float32, N=9 K=3
H=64, CPU ms; B=4 T=512: 128 x 128 71, 128 x 256 73, 128 x 512 136, unrolled 130; B=2 T=2048: 499,
424, 551).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

from jaxtune.hlo import notes
from jaxtune.ops.attention import flash
from jaxtune.ops.attention.blocks import seen_blocks
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED, Mask, visible


class _Axes(NamedTuple):
    """Which axis of a tile of scores, [B, K, ., ., .], is which."""

    group: int
    query: int
    key: int


_FORWARD, _BACKWARD = _Axes(group=2, query=3, key=4), _Axes(group=3, query=4, key=2)


class _Tiles(NamedTuple):
    """The tiles that the loop visits.

    Attributes:
        rows, cols: queries and keys of a tile.
        query_blocks, key_blocks: int32 [tiles], the blocks of each tile.
        count: how many to visit, from the first.
        most: how many there are at most, whatever the data.
    """

    rows: int
    cols: int
    query_blocks: jax.Array
    key_blocks: jax.Array
    count: int | jax.Array
    most: int

    def visit(self, step: Callable[[Any, Any, Any], Any], state: Any) -> Any:
        """Calls step(first query, first key, state) -> state for each tile."""

        def body(index: jax.Array, state: Any) -> Any:
            first_query = self.query_blocks[index] * self.rows
            return step(first_query, self.key_blocks[index] * self.cols, state)

        with notes.at_most(self.most):
            return jax.lax.fori_loop(0, self.count, body, state)


def _tiles(operands: Operands) -> _Tiles:
    t, s = operands.q.shape[1], operands.k.shape[1]
    rows = _even(t, 128)
    cols = _even(s, 128 if s <= 1024 else 256)
    offset, mask = operands.query_offset, operands.mask
    some, _ = seen_blocks(mask, offset, (t, s), (rows, cols))
    some = some.any(axis=0)
    most = some.size
    if isinstance(some, np.ndarray):
        pairs = np.nonzero(some)
        count = most = pairs[0].size
    else:
        pairs = jnp.nonzero(some, size=some.size, fill_value=0)
        count = some.sum()
        if isinstance(offset, int):
            of_any = dataclasses.replace(mask, query_segments=None, key_segments=None, columns=None)
            some_of_any, _ = seen_blocks(of_any, offset, (t, s), (rows, cols))
            most = int(np.count_nonzero(some_of_any))
    query_blocks, key_blocks = (jnp.asarray(x, jnp.int32) for x in pairs)
    return _Tiles(rows, cols, query_blocks, key_blocks, count, most)


def _even(length: int, most: int) -> int:
    """Size of equal blocks of at most `most` elements, with little padding at the end."""
    return -(-length // -(-length // most))


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind, up to a multiple of size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths)


def _queries(x: jax.Array, kv: int, rows: int) -> jax.Array:
    """[B, T, N, ...] -> [B, K, G, T padded, ...] with G = N / K."""
    b, t, n = x.shape[:3]
    return _pad(x.swapaxes(1, 2).reshape(b, kv, n // kv, t, *x.shape[3:]), 3, rows)


def _keys(x: jax.Array, cols: int) -> jax.Array:
    """[B, S, K, H] -> [B, K, S padded, H]."""
    return _pad(x.swapaxes(1, 2), 2, cols)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


class _Scores:
    """Turns products q k^T of a tile into masked scores; `axes` says how the tile is laid out."""

    def __init__(self, operands: Operands, tiles: _Tiles, axes: _Axes):
        self.operands, self.tiles, self.axes = operands, tiles, axes
        mask = operands.mask
        pads = {"query_segments": tiles.rows, "key_segments": tiles.cols, "columns": tiles.cols}
        self.mask: Mask = dataclasses.replace(
            mask,
            **{
                name: jax.tree.map(lambda x, size=size: _pad(x, 1, size), getattr(mask, name))
                for name, size in pads.items()
            },
        )

    def _along(self, axis: int, x: jax.Array) -> jax.Array:
        """[B or 1, L] -> five axes, L at the one named."""
        return jnp.expand_dims(x, [i for i in range(1, 5) if i != axis])

    def __call__(
        self, dots: jax.Array, first_query: jax.Array, first_key: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | float]:
        """Scores, what of them is seen (None: all) and their derivative to the dots."""
        operands, tiles = self.operands, self.tiles
        positions = operands.query_offset + first_query + jnp.arange(tiles.rows)
        positions = self._along(self.axes.query, positions[None])
        keys = self._along(self.axes.key, (first_key + jnp.arange(tiles.cols))[None])
        scores, slope = dots * operands.scale, operands.scale
        if operands.softcap is not None:
            tanh = jnp.tanh(scores / operands.softcap)
            scores, slope = operands.softcap * tanh, operands.scale * (1 - tanh * tanh)
        if operands.alibi is not None:
            prefix = operands.mask.prefix
            slopes = operands.alibi.reshape(1, dots.shape[1], -1)
            slopes = jnp.expand_dims(slopes, [i for i in range(2, 5) if i != self.axes.group])
            scores -= slopes * jnp.where(keys < prefix, 0, jnp.abs(positions - (keys - prefix)))
        if operands.relative is not None:
            scores += self._relative(first_query, first_key)
        return scores, self._sees(positions, keys, first_query, first_key), slope

    def _relative(self, first_query: jax.Array, first_key: jax.Array) -> jax.Array:
        """What is added to the scores of a tile for the distance of its queries and keys."""
        rows, cols = self.tiles.rows, self.tiles.cols
        padded, first = _distances(self.operands, self.tiles, first_query, first_key)
        values = dynamic_slice_in_dim(padded, first, rows + cols - 1, 1)
        kv = self.operands.k.shape[2]
        tile = _diagonals(values, rows, cols).reshape(1, kv, -1, rows, cols)
        return jnp.moveaxis(tile, (2, 3, 4), self.axes)

    def _sees(
        self, positions: jax.Array, keys: jax.Array, first_query: jax.Array, first_key: jax.Array
    ) -> jax.Array | None:
        def of_queries(x: jax.Array) -> jax.Array:
            cut = dynamic_slice_in_dim(x, first_query, self.tiles.rows, 1)
            return self._along(self.axes.query, cut)

        def of_keys(x: jax.Array) -> jax.Array:
            cut = dynamic_slice_in_dim(x, first_key, self.tiles.cols, 1)
            return self._along(self.axes.key, cut)

        mask, s = self.mask, self.operands.k.shape[1]
        block = dataclasses.replace(
            mask,
            query_segments=jax.tree.map(of_queries, mask.query_segments),
            key_segments=jax.tree.map(of_keys, mask.key_segments),
            columns=jax.tree.map(of_keys, mask.columns),
        )
        sees = visible(block, positions, keys)
        if s % self.tiles.cols == 0:
            return sees
        return keys < s if sees is None else sees & (keys < s)


def _distances(
    operands: Operands, tiles: _Tiles, first_query: Any, first_key: Any
) -> tuple[jax.Array, jax.Array]:
    """`relative` with room for the padding of tiles, and its first column that a tile needs."""
    assert operands.relative is not None
    room = tiles.rows + tiles.cols
    center = operands.relative.shape[1] // 2
    padded = jnp.pad(operands.relative, ((0, 0), (room, room)))
    return padded, first_key - first_query + room + center - (tiles.rows - 1)


def _diagonals(values: jax.Array, rows: int, cols: int) -> jax.Array:
    """[N, rows, cols] with values[n, column - row + rows - 1], of values [N, rows + cols - 1].

    One row of zeros too long, read again and again as if it were not: each time round it is one
    place further. A gather, and the scatter that is its gradient, are slow on most devices.
    """
    n, width = values.shape
    longer = jnp.broadcast_to(jnp.pad(values, ((0, 0), (0, 1)))[:, None], (n, rows, width + 1))
    shifted = longer.reshape(n, -1)[:, : rows * width].reshape(n, rows, width)
    return shifted[:, :, rows - 1 :]


def forward(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """See `flash.Passes`."""
    b, t, n, h = operands.q.shape
    kv, g = operands.k.shape[2], n // operands.k.shape[2]
    tiles = _tiles(operands)
    rows, cols = tiles.rows, tiles.cols
    score = _Scores(operands, tiles, _FORWARD)
    q, k, v = _queries(operands.q, kv, rows), _keys(operands.k, cols), _keys(operands.v, cols)

    def step(first_query: jax.Array, first_key: jax.Array, state: tuple) -> tuple:
        cut = functools.partial(dynamic_slice_in_dim, start_index=first_query, slice_size=rows)
        put = functools.partial(dynamic_update_slice_in_dim, start_index=first_query, axis=3)
        block = cut(q, axis=3).reshape(b, kv, g * rows, h)
        dots = _dot("bkth,bksh->bkts", block, dynamic_slice_in_dim(k, first_key, cols, 2))
        scores, sees, _ = score(dots.reshape(b, kv, g, rows, cols), first_query, first_key)
        if sees is not None:
            scores = jnp.where(sees, scores, MASKED)
        old, total, y = (cut(x, axis=3) for x in state)
        top = jnp.maximum(old, scores.max(axis=-1))
        weights, keep = jnp.exp(scores - top[..., None]), jnp.exp(old - top)
        total = total * keep + weights.sum(axis=-1)
        weights = weights.astype(operands.softmax_dtype).reshape(b, kv, g * rows, cols)
        values = dynamic_slice_in_dim(v, first_key, cols, 2).astype(operands.softmax_dtype)
        mixed = _dot("bkts,bksh->bkth", weights, values).reshape(y.shape)
        found = top, total, y * keep[..., None] + mixed
        return tuple(put(x, update) for x, update in zip(state, found, strict=True))

    zeros = jnp.zeros_like(q[..., 0], jnp.float32)
    if operands.sinks is None:
        # Above MASKED, so that the weight of a masked score is 0 from the first tile on.
        top, total = zeros + MASKED / 2, zeros
    else:
        top, total = zeros + operands.sinks.reshape(kv, g, 1), zeros + 1
    top, total, y = tiles.visit(step, (top, total, jnp.zeros_like(q, jnp.float32)))
    y = (y / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)
    lse = jnp.where(total > 0, top + jnp.log(total), MASKED)
    y, lse = (x[:, :, :, :t].reshape(b, n, t, *x.shape[4:]).swapaxes(1, 2) for x in (y, lse))
    return y, lse


def backward(
    operands: Operands, lse: jax.Array, dy: jax.Array, delta: jax.Array
) -> tuple[jax.Array, ...]:
    """See `flash.Passes`."""
    b, t, n, h = operands.q.shape
    s, kv = operands.k.shape[1:3]
    tiles, g, dtype = _tiles(operands), n // kv, operands.q.dtype
    rows, cols = tiles.rows, tiles.cols
    score = _Scores(operands, tiles, _BACKWARD)
    q, dy, lse, delta = (_queries(x, kv, rows) for x in (operands.q, dy, lse, delta))
    k, v = _keys(operands.k, cols), _keys(operands.v, cols)
    k_transposed = k.swapaxes(2, 3)

    def step(first_query: jax.Array, first_key: jax.Array, state: tuple) -> tuple:
        def cut(x: jax.Array) -> jax.Array:
            return dynamic_slice_in_dim(x, first_query, rows, 3)

        def add(x: jax.Array, part: jax.Array, first: jax.Array, axis: int) -> jax.Array:
            old = dynamic_slice_in_dim(x, first, part.shape[axis], axis)
            return dynamic_update_slice_in_dim(x, old + part, first, axis)

        queries, dys = (cut(x).reshape(b, kv, g * rows, h) for x in (q, dy))
        keys, values = (dynamic_slice_in_dim(x, first_key, cols, 2) for x in (k, v))
        dots = _dot("bksh,bkth->bkst", keys, queries).reshape(b, kv, cols, g, rows)
        scores, sees, slope = score(dots, first_query, first_key)
        weights = jnp.exp(scores - cut(lse)[:, :, None])
        if sees is not None:
            weights = jnp.where(sees, weights, 0)
        dweights = _dot("bksh,bkth->bkst", values, dys).reshape(dots.shape)
        dscores = weights * (dweights - cut(delta)[:, :, None])
        dq, dk, dv, drelative = state
        if drelative is not None:
            drelative = _add_diagonals(drelative, operands, tiles, dscores, first_query, first_key)
        dscores = (dscores * slope).astype(dtype).reshape(b, kv, cols, g * rows)
        weights = weights.astype(operands.softmax_dtype).reshape(dscores.shape)
        part = dynamic_slice_in_dim(k_transposed, first_key, cols, 3)
        part = _dot("bkhs,bkst->bkht", part, dscores).reshape(b, kv, h, g, rows)
        dq = add(dq, part, first_query, 4)
        dk = add(dk, _dot("bkst,bkth->bksh", dscores, queries), first_key, 2)
        part = _dot("bkst,bkth->bksh", weights, dys.astype(operands.softmax_dtype))
        return dq, dk, add(dv, part, first_key, 2), drelative

    dq = jnp.zeros_like(q.transpose(0, 1, 4, 2, 3), jnp.float32)  # [B, K, H, G, T]
    dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (k, v))
    drelative = None
    if operands.relative is not None:
        drelative = jnp.zeros_like(_distances(operands, tiles, 0, 0)[0])
    dq, dk, dv, drelative = tiles.visit(step, (dq, dk, dv, drelative))
    dq = dq[..., :t].transpose(0, 4, 1, 3, 2).reshape(b, t, n, h)
    dk, dv = (x[:, :, :s].swapaxes(1, 2) for x in (dk, dv))
    found = dq.astype(dtype), dk.astype(operands.k.dtype), dv.astype(operands.v.dtype)
    return found if drelative is None else (*found, drelative[:, rows + cols : -rows - cols])


def _add_diagonals(
    total: jax.Array, operands: Operands, tiles: _Tiles, dscores: jax.Array, *firsts: jax.Array
) -> jax.Array:
    """The gradient of padded `relative` with that of a tile, dscores [B, K, cols, G, rows]."""
    rows, cols = tiles.rows, tiles.cols
    tile = jnp.moveaxis(dscores.sum(axis=0), 1, 3).reshape(-1, rows, cols)
    values = jax.ShapeDtypeStruct((tile.shape[0], rows + cols - 1), tile.dtype)
    transposed = jax.linear_transpose(lambda x: _diagonals(x, rows, cols), values)
    (sums,) = transposed(tile)
    _, first = _distances(operands, tiles, *firsts)
    old = dynamic_slice_in_dim(total, first, sums.shape[1], 1)
    return dynamic_update_slice_in_dim(total, old + sums, first, 1)


attend = functools.partial(flash.attend, flash.Passes(forward, backward))
