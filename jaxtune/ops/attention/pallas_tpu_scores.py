"""What the forward and the backward kernel for TPUs share: layouts, steps, a block of scores."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.attention import blocks
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import Columns, Mask, visible

LOG2E = math.log2(math.e)
HIDDEN = -2e38  # a hidden logit: far below MASKED, the running maximum of a query that sees nothing
LANES = 128

Refs = Mapping[str, Any]
Interpret = bool | pltpu.InterpretParams


class Sizes(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        queries, keys: of a block, the unit that is fetched, and skipped where the mask empties it.
        part: keys whose scores are computed at a time; divides `keys`. The matrix unit works on
            the next part while the vector unit is busy with this one.
    """

    queries: int
    keys: int
    part: int


class Operand(NamedTuple):
    """An array of a kernel call and the block of it that a grid step sees."""

    array: jax.Array
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Steps:
    """The walk over a mask's blocks as the kernels read it from scalar memory.

    Attributes:
        words: int32 [rows * length], see `blocks.walk`; one row for all, or one for each of B.
        offset: int32 [1], the query offset.
        rows, length: static.
        count: steps of the longest row, an int or an int32 scalar.
    """

    words: jax.Array
    offset: jax.Array
    rows: int
    length: int
    count: Any

    def word(self, words: Any, row: Any, step: Any) -> Any:
        """The word of a step, from the prefetched array."""
        return words[step if self.rows == 1 else row * self.length + step]


def plan(operands: Operands, sizes: Sizes, *, keys: slice, writes: int = 0) -> Steps:
    """The steps over all blocks of queries and the given blocks of keys."""
    lengths = operands.q.shape[1], operands.k.shape[1]
    seen = blocks.seen_blocks(
        operands.mask, operands.query_offset, lengths, (sizes.queries, sizes.keys)
    )
    some, every = (x[:, :, keys] for x in seen)
    words, count = blocks.walk(some, every, writes=writes)
    return Steps(
        words=jnp.asarray(words).reshape(-1),
        offset=jnp.asarray(operands.query_offset, jnp.int32).reshape(1),
        rows=words.shape[0],
        length=words.shape[1],
        count=int(count) if isinstance(words, np.ndarray) else count,
    )


def padded(array: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    """The array, filled up along an axis to a multiple."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths, constant_values=value) if widths[axis][1] else array


def heads_first(array: jax.Array, block: int) -> jax.Array:
    """[B, T, N, H] -> [B, N, T filled up to whole blocks, H]."""
    return padded(array.transpose(0, 2, 1, 3), 2, block)


def mask_operands(
    mask: Mask, sizes: Sizes, query: Callable[..., tuple], key: Callable[..., tuple]
) -> dict[str, Operand]:
    """The mask's arrays as rows [B, 1, T] or [B, 1, S].

    Args:
        mask: the mask.
        sizes: of the blocks.
        query, key: from grid indices and prefetched scalars to (batch, block).
    """

    def row(array: jax.Array, block: int, index: Callable[..., tuple]) -> Operand:
        def at(*grid: Any) -> tuple:
            batch, number = index(*grid)
            return batch, 0, number

        return Operand(padded(array, 1, block)[:, None], pl.BlockSpec((None, 1, block), at))

    found = {}
    if mask.query_segments is not None and mask.key_segments is not None:
        found["query_segments"] = row(mask.query_segments, sizes.queries, query)
        found["key_segments"] = row(mask.key_segments, sizes.keys, key)
    columns = mask.columns or Columns()
    for name in ("lts", "lte", "uts", "ute"):
        array = getattr(columns, name)
        if array is not None:
            found[name] = row(array, sizes.keys, key)
    return found


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis contract[0] of x and contract[1] of y, in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def spread(array: jax.Array, width: int) -> jax.Array:
    """[rows, lanes], the same number in all lanes, -> [rows, width]."""
    repeats = -(-width // array.shape[1])
    wide = jnp.tile(array, (1, repeats)) if repeats > 1 else array
    return wide if wide.shape[1] == width else wide[:, :width]


def column(row: jax.Array, width: int) -> jax.Array:
    """[1, L] -> [L, width]: the row as a column, repeated along the lanes."""
    lanes = min(width, LANES)
    return spread(jnp.broadcast_to(row, (lanes, row.shape[1])).T, width)


def base(operands: Operands) -> float:
    """Logits are in base 2, as the hardware's exponential is: this factor is in them already.

    Not with ALiBi, whose bias is large and must be rounded as it is in the definition.
    """
    return LOG2E if operands.alibi is None else 1.0


def power(operands: Operands, logits: jax.Array) -> jax.Array:
    """The exponential of logits that have the factor `base`."""
    return jnp.exp2(logits if operands.alibi is None else logits * LOG2E)


class Scores(NamedTuple):
    """The scores of one part of a block; [queries, keys] or, transposed, [keys, queries].

    Attributes:
        settings: the operands, of which only what is static is looked at.
        refs: of the kernel's operands; "alibi" in scalar memory; unless transposed, "segments" has
            the queries' ids as a column, repeated along the lanes.
        start: index of the first query (with the offset: its position) and of the first key.
        inside: of the first key in its block.
        shape: queries and keys.
        transposed: whether keys come first.
    """

    settings: Operands
    refs: Refs
    start: tuple[Any, Any]
    inside: int
    shape: tuple[int, int]
    transposed: bool

    def _index(self, axis: int) -> jax.Array:
        shape = self.shape[::-1] if self.transposed else self.shape
        iota = lax.broadcasted_iota(jnp.int32, shape, axis ^ self.transposed)
        return self.start[axis] + iota

    def logits(self, products: jax.Array, head: Any) -> tuple[jax.Array, jax.Array | None]:
        """From q k^T to logits times `base`, and the softcap's derivative (None: 1)."""
        settings, derivative = self.settings, None
        if settings.softcap is None:
            logits = products * (settings.scale * base(settings))
        else:
            bent = jnp.tanh(products * (settings.scale / settings.softcap))
            logits = bent * (settings.softcap * base(settings))
            derivative = 1 - bent * bent
        if settings.alibi is not None:
            keys, prefix = self._index(1), settings.mask.prefix
            distance = jnp.abs(self._index(0) - (keys - prefix)).astype(jnp.float32)
            if prefix:
                distance = jnp.where(keys < prefix, 0.0, distance)
            logits -= self.refs["alibi"][head] * distance
        return logits, derivative

    def seen(self) -> jax.Array | None:
        """Which of the pairs are visible; None: all."""
        mask, keys = self.settings.mask, self._index(1)

        def of_keys(name: str) -> jax.Array | None:
            if name not in self.refs:
                return None
            row = self.refs[name][:, self.inside : self.inside + self.shape[1]]
            return column(row, self.shape[0]) if self.transposed else row

        of_queries = None
        if "query_segments" in self.refs:
            if self.transposed:
                of_queries = self.refs["query_segments"][...]
            else:
                of_queries = spread(self.refs["segments"][...], self.shape[1])
        columns = Columns(*(of_keys(name) for name in ("lts", "lte", "uts", "ute")))
        mask = dataclasses.replace(
            mask,
            query_segments=of_queries,
            key_segments=of_keys("key_segments"),
            columns=columns if mask.columns is not None else None,
        )
        seen = visible(mask, self._index(0), keys)
        total = self.settings.k.shape[1]
        if total % self.refs["k"].shape[0]:  # the last block of keys is filled up
            seen = keys < total if seen is None else seen & (keys < total)
        return seen


def when(flags: Any, bits: int, value: int | None = None) -> Callable:
    """Runs the function under it if these bits of the flags are set (or have this value)."""
    return pl.when((flags & bits) == (bits if value is None else value))
