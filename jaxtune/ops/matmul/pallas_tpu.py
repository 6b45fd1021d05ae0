"""Products with a quantized weight on TPU: tiles are decoded in VMEM, nowhere is it ever dense.

    forward     y  = x W + u v        x [..., D], W [D, F]
    transposed  dx = g W^T + u v      g [..., F]

One kernel does both. Its grid runs over (rows of x, columns of the result, tiles of the summed
axis), and a tile of W is decoded once for up to 2048 rows of x, so that decoding is a small part of
the work. It is hidden, too: grid step k decodes tile k into one half of a buffer while the matrix
unit multiplies with tile k - 1 in the other half. Step 0 has nothing to multiply yet; it starts the
float32 sums with the low-rank product u v of an adapter instead.

A code is looked up by a gather within a vector register, which the permute unit does while the
vector unit is free for scaling: a tree of selects takes 15 vector operations for each code and
would outlast the matrix unit on v6e.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.matmul.xla import Pair
from jaxtune.quant import QArray, decode_scale
from jaxtune.quant.codebook import BOOKS
from jaxtune.quant.int4 import MIDDLE
from jaxtune.quant.qarray import PACK_ROWS

LANES, SUBLANES = 128, 8
STRIP = PACK_ROWS // 2  # rows that are decoded at once: one packed tile of 8-bit numbers
BLOCK = 512  # rows and columns of a tile of W
ROWS = 2048  # most rows of x that share a decoded tile
CHUNK = 1024  # most rows of x that the inner loop multiplies at once
VMEM = 15 * 2**20  # what a kernel may use on every TPU without asking for more is 16 MiB


def forward(x: jax.Array, w: QArray, low: Pair | None, *, interpret: Any = False) -> jax.Array:
    """x [..., D] W + u v: [..., F] in x's dtype, for low = (u [..., R], v [R, F]).

    Args:
        x: float32 or bfloat16; W is decoded to the same dtype, sums are float32.
        w: [D, F], without an order; scales for groups of 32 n rows.
        low: added to the product, or None.
        interpret: run the kernel in pallas' interpreter (for tests).

    Raises:
        NotImplementedError: the weight's groups are of another size.
    """
    return _product(x, w, low, False, interpret)


def transposed(g: jax.Array, w: QArray, low: Pair | None, *, interpret: Any = False) -> jax.Array:
    """g [..., F] W^T + u v: [..., D] in g's dtype, for low = (u [..., R], v [R, D]).

    Arguments and errors are those of `forward`.
    """
    return _product(g, w, low, True, interpret)


@dataclass(frozen=True)
class _Plan:
    """Block sizes of one product, [m, contracted] x [contracted, columns].

    Attributes:
        transposed: whether W is read as W^T: rows of its tiles are then columns of the result.
        format: of the codes.
        group_rows: rows of W that share a scale.
        groups: how many there are.
        m, contracted, columns: sizes of the product.
        bm, bk, bn: sizes of its blocks.
        chunks: turns of the inner loop over bm.
    """

    transposed: bool
    format: str
    group_rows: int
    groups: int
    m: int
    contracted: int
    columns: int
    bm: int
    bk: int
    bn: int
    chunks: int

    @property
    def steps(self) -> int:
        """Tiles of the summed axis."""
        return pl.cdiv(self.contracted, self.bk)

    @property
    def ragged(self) -> int:
        """Size of the last tile of the summed axis, if it is not a whole one; else 0."""
        return self.contracted % self.bk

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of W."""
        return (self.bn, self.bk) if self.transposed else (self.bk, self.bn)

    @property
    def unit(self) -> int:
        """Rows of W that are decoded together."""
        rows = self.tile[0]
        return PACK_ROWS if rows % PACK_ROWS == 0 else rows


def _product(
    x: jax.Array, w: QArray, low: Pair | None, transposed: bool, interpret: Any
) -> jax.Array:
    if w.group_rows % STRIP and w.group_rows != w.shape[0]:
        raise NotImplementedError(f"scales of {w.group_rows} rows: the kernel wants 32, 64, 96 ...")
    scale = decode_scale(w.scale, w.shape)
    *batch, contracted = x.shape
    m, (d, f) = math.prod(batch), w.shape
    columns = d if transposed else f
    x = x.reshape(m, contracted)
    plan = _make_plan(transposed, w, scale.shape[0], m, contracted, columns, x.dtype.itemsize)
    operands: dict[str, Any] = {"x": x, "codes": w.codes, "scale": scale}
    if w.zero is not None:
        operands["zero"] = w.zero
    if w.format in BOOKS:
        book = np.pad(BOOKS[w.format], (0, LANES - 16))
        operands["book"] = jnp.asarray(np.tile(book, (SUBLANES, 1)))
    if low is not None:
        operands["u"] = low[0].reshape(m, -1)
        operands["v"] = low[1]
    y = _call(plan, operands, x.dtype, interpret)
    return y.reshape(*batch, columns)


def _make_plan(
    transposed: bool, w: QArray, groups: int, m: int, contracted: int, columns: int, itemsize: int
) -> _Plan:
    # Lanes of a tile are padded to whole registers, which the lookup wants.
    bk = _contracted_block(contracted, whole=not transposed)
    bn = _column_block(columns, whole=transposed)
    blocks = pl.cdiv(m, ROWS)
    while True:
        bm = pl.cdiv(m, blocks)
        chunks = pl.cdiv(bm, CHUNK)
        if blocks > 1 or chunks > 1:
            bm = pl.cdiv(bm, chunks * 16) * chunks * 16
        scales = 2 * 4 * groups * (bk if transposed else bn) * (1 if w.zero is None else 2)
        used = bm * (2 * bk * itemsize + 2 * bn * itemsize + 4 * bn)
        used += 2 * bk * bn * (itemsize + 1) + scales
        if used <= VMEM or bm <= 256:
            break
        blocks += 1
    return _Plan(
        transposed, w.format, w.group_rows, groups, m, contracted, columns, bm, bk, bn, chunks
    )


def _contracted_block(size: int, whole: bool) -> int:
    """A tile's size on the summed axis; a divisor of the axis if there is a good one.

    Args:
        size: of the axis.
        whole: whether one tile of any size may take the whole axis.
    """
    if whole and size <= 3 * BLOCK // 2:
        return size
    divisors = [block for block in range(BLOCK, LANES, -LANES) if size % block == 0]
    return divisors[0] if divisors else min(BLOCK, _round_up(size, LANES))


def _column_block(size: int, whole: bool) -> int:
    """A tile's size on the axis of the result, which is cut as evenly as registers allow."""
    if whole and size <= 3 * BLOCK // 2:
        return size
    return _round_up(pl.cdiv(size, pl.cdiv(size, BLOCK)), LANES)


def _round_up(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def _call(plan: _Plan, operands: dict[str, Any], dtype: Any, interpret: Any) -> jax.Array:
    rows, columns = plan.tile
    packed = plan.format != "int8"
    last = plan.steps - 1

    def tile(j: Any, k: Any) -> tuple[Any, Any]:
        """Block of W that step k decodes."""
        k = jnp.minimum(k, last)
        return (j, k) if plan.transposed else (k, j)

    scale_spec = pl.BlockSpec((plan.groups, columns), lambda i, j, k: (0, tile(j, k)[1]))
    rank = operands["v"].shape[0] if "v" in operands else 0
    specs = {
        "x": pl.BlockSpec((plan.bm, plan.bk), lambda i, j, k: (i, jnp.maximum(k - 1, 0))),
        "codes": pl.BlockSpec((rows // 2 if packed else rows, columns), lambda i, j, k: tile(j, k)),
        "scale": scale_spec,
        "zero": scale_spec,
        "book": pl.BlockSpec((SUBLANES, LANES), lambda i, j, k: (0, 0)),
        "u": pl.BlockSpec((plan.bm, rank), lambda i, j, k: (i, 0)),
        "v": pl.BlockSpec((rank, plan.bn), lambda i, j, k: (0, j)),
    }
    grid = (pl.cdiv(plan.m, plan.bm), pl.cdiv(plan.columns, plan.bn), plan.steps + 1)
    read = [math.prod(array.shape) * array.dtype.itemsize for array in operands.values()]
    written = plan.m * plan.columns * dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.columns), dtype),
        grid=grid,
        in_specs=[{name: specs[name] for name in operands}],
        out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((plan.bm, plan.bn), jnp.float32),
            pltpu.VMEM((2, rows, columns), dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.columns * (plan.contracted + rank),
            bytes_accessed=grid[1] * read[0] + grid[0] * sum(read[1:]) + written,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"{plan.format}_matmul" + ("_transposed" if plan.transposed else ""),
    )(operands)


def _kernel(refs: dict[str, Any], out: Any, sums: Any, tiles: Any, *, plan: _Plan) -> None:
    j, k = pl.program_id(1), pl.program_id(2)
    half = jax.lax.rem(k, 2)
    size = plan.bm // plan.chunks
    units = plan.tile[0] // plan.unit
    share = pl.cdiv(units, plan.chunks)
    first_row = (j if plan.transposed else jnp.minimum(k, plan.steps - 1)) * plan.tile[0]

    def each_chunk(work: Any) -> None:
        """Some work on each chunk of x, and a share of decoding the next tile."""

        def body(i: Any, _: None) -> None:
            work(pl.ds(i * size if plan.chunks == 1 else pl.multiple_of(i * size, size), size))
            for n in range(share):
                # The last share may overlap the one before, which decodes the same once more.
                unit = jnp.minimum(i * share, units - share) + n
                _decode(refs, tiles, half, unit, first_row, k, plan)

        jax.lax.fori_loop(0, plan.chunks, body, None)

    def start(rows: Any) -> None:
        if "u" in refs:
            u, v = refs["u"][rows, :], refs["v"][...]
            sums[rows, :] = jnp.dot(u, v, preferred_element_type=jnp.float32)
        else:
            sums[rows, :] = jnp.zeros((size, plan.bn), jnp.float32)

    def multiply(rows: Any) -> None:
        x = refs["x"][rows, :]
        if plan.ragged:
            column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(column < plan.contracted - (k - 1) * plan.bk, x, 0)
        axis = 1 if plan.transposed else 0
        sums[rows, :] += jax.lax.dot_general(
            x, tiles[1 - half], (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
        )

    pl.when(k == 0)(lambda: each_chunk(start))
    pl.when(k > 0)(lambda: each_chunk(multiply))

    @pl.when(k == plan.steps)
    def _() -> None:
        out[...] = sums[...].astype(out.dtype)


def _decode(
    refs: dict[str, Any], tiles: Any, half: Any, unit: Any, first_row: Any, k: Any, plan: _Plan
) -> None:
    """Decodes one unit of rows of the current tile of W into one half of the buffer."""
    packed = plan.format != "int8"
    for start in range(0, plan.unit, STRIP):
        rows = min(STRIP, plan.unit - start)
        if packed:
            codes = refs["codes"][pl.ds(pl.multiple_of(unit * STRIP, STRIP), STRIP), :]
            codes = codes.astype(jnp.int32)
            codes = codes >> 4 if start else codes & 15
        else:
            codes = refs["codes"][pl.ds(unit * plan.unit + start, rows), :].astype(jnp.int32)
        row = unit * plan.unit + start
        # Rows past the end of W belong to no group; what they become is not kept.
        group = jax.lax.div(first_row + row, plan.group_rows)
        group = pl.ds(jnp.minimum(group, plan.groups - 1), 1)
        scale = refs["scale"][group, :]
        if plan.ragged and plan.transposed:
            column = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1)
            left = plan.contracted - jnp.minimum(k, plan.steps - 1) * plan.bk
            scale = jnp.where(column < left, scale, 0)
        if plan.format in BOOKS:
            values = _look_up(codes, refs["book"][...])
        elif "zero" in refs:
            values = codes.astype(jnp.float32) - refs["zero"][group, :]
        else:
            values = (codes - (MIDDLE if packed else 0)).astype(jnp.float32)
        tiles[half, pl.ds(row, rows), :] = (values * scale).astype(tiles.dtype)


def _look_up(codes: jax.Array, book: jax.Array) -> jax.Array:
    """book[codes], a gather within the lanes of each register; book is the first 16 lanes."""
    found = [
        [
            jnp.take_along_axis(
                book,
                codes[row : row + SUBLANES, lane : lane + LANES],
                axis=1,
                mode="promise_in_bounds",
            )
            for lane in range(0, codes.shape[1], LANES)
        ]
        for row in range(0, codes.shape[0], SUBLANES)
    ]
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in found], axis=0)
