"""Products with a quantized weight on TPU: tiles are decoded in VMEM, nowhere is it ever dense.

    forward     y  = x W + u^T v        x [..., D], W [D, F]
    transposed  dx = g W^T + u^T v      g [..., F]

One kernel does both. Its grid runs over (rows of x, columns of the result, tiles of the summed
axis), and a tile of W is decoded once for up to 2048 rows of x, so that decoding is a small part of
the work. It is hidden, too: grid step k decodes tile k into one half of a buffer while the matrix
unit multiplies with tile k - 1 in the other half. Step 0 has nothing to multiply yet; it starts the
float32 sums with the low-rank product u^T v of an adapter instead.

A code is looked up by a gather within a vector register, which the permute unit does while the
vector unit is free for scaling: a tree of selects takes 15 vector operations for each code and
would outlast the matrix unit on v6e.
"""

import dataclasses
import functools
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
    """x [..., D] W + u^T v: [..., F] in x's dtype, for low = (u [R, ...], v [R, F]).

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
    """g [..., F] W^T + u^T v: [..., D] in g's dtype, for low = (u [R, ...], v [R, D]).

    Arguments and errors are those of `forward`.
    """
    return _product(g, w, low, True, interpret)


@dataclass(frozen=True)
class Plan:
    """One product, [m, contracted] x [contracted, columns] + [rank, m]^T x [rank, columns].

    Attributes:
        transposed: whether W is read as W^T: rows of its tiles are then columns of the result.
        format: of the codes.
        group_rows, groups: rows of W that share a scale, and how many such groups there are.
        has_zero: whether groups have a zero of their own.
        dtype: of x, of the decoded tiles and of the result.
        m, contracted, columns, rank: sizes of the product; rank 0: nothing is added to it.
        bk, bn: sizes of the blocks of `contracted` and `columns`.
        blocks: of m.
    """

    transposed: bool
    format: str
    group_rows: int
    groups: int
    has_zero: bool
    dtype: np.dtype
    m: int
    contracted: int
    columns: int
    rank: int
    bk: int
    bn: int
    blocks: int

    @property
    def chunks(self) -> int:
        """Turns of the inner loop over a block of m."""
        return pl.cdiv(pl.cdiv(self.m, self.blocks), CHUNK)

    @property
    def bm(self) -> int:
        """Size of a block of m: all of it, or chunks that fill registers as rows and as lanes."""
        if self.blocks == self.chunks == 1:
            return self.m
        return self.chunks * _round_up(pl.cdiv(self.m, self.blocks * self.chunks), LANES)

    @property
    def steps(self) -> int:
        """Tiles of the summed axis."""
        return pl.cdiv(self.contracted, self.bk)

    @property
    def is_ragged(self) -> bool:
        """Whether the last tile of the summed axis hangs over its end."""
        return self.contracted % self.bk != 0

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of W."""
        return (self.bn, self.bk) if self.transposed else (self.bk, self.bn)

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.format != "int8"

    @property
    def unit(self) -> int:
        """Rows of W that are decoded together."""
        rows = self.tile[0]
        return PACK_ROWS if rows % PACK_ROWS == 0 else rows

    @property
    def scale_rows(self) -> int:
        """Rows of scales that a tile comes with: its own if they fill registers, else all."""
        own, rest = divmod(self.tile[0], self.group_rows)
        return own if own and not rest and own % SUBLANES == 0 else self.groups

    @property
    def vmem(self) -> int:
        """Bytes of VMEM: blocks have two buffers, numbers in lanes are padded to registers."""
        rows, columns = self.tile
        size = self.dtype.itemsize
        low = _round_up(self.rank, 2 * SUBLANES)
        windows = (self.bm * (self.bk + self.bn) + low * (self.bm + self.bn)) * size
        windows += rows * columns // (1 + self.packed)
        windows += 4 * _round_up(self.scale_rows, SUBLANES) * columns * (1 + self.has_zero)
        return 2 * windows + 4 * self.bm * self.bn + 2 * rows * columns * size


def make_plan(x: Any, w: QArray, rank: int, transposed: bool) -> Plan:
    """Blocks of a product that fit the VMEM of every TPU.

    Args:
        x: [..., contracted], an array or its shape.
        w: [D, F].
        rank: of what is added, or 0.
        transposed: whether the product is with W^T.
    """
    contracted, columns = reversed(w.shape) if transposed else w.shape
    m = x.size // contracted
    plan = Plan(
        transposed=transposed,
        format=w.format,
        group_rows=w.group_rows,
        groups=w.shape[0] // w.group_rows,
        has_zero=w.zero is not None,
        dtype=x.dtype,
        m=m,
        contracted=contracted,
        columns=columns,
        rank=rank,
        bk=_summed_block(contracted, whole=not transposed),
        bn=_column_block(columns, whole=transposed),
        blocks=pl.cdiv(m, ROWS),
    )
    while plan.vmem > VMEM and plan.bm > CHUNK // 4:
        plan = dataclasses.replace(plan, blocks=plan.blocks + 1)
    return plan


def _product(
    x: jax.Array, w: QArray, low: Pair | None, transposed: bool, interpret: Any
) -> jax.Array:
    if w.group_rows % STRIP and w.group_rows != w.shape[0]:
        raise NotImplementedError(f"scales of {w.group_rows} rows: the kernel wants 32, 64, 96 ...")
    plan = make_plan(x, w, low[1].shape[0] if low else 0, transposed)
    operands = {"x": x.reshape(plan.m, -1), "codes": w.codes}
    operands["scale"] = decode_scale(w.scale, w.shape)
    if w.zero is not None:
        operands["zero"] = w.zero
    if w.format in BOOKS:
        book = np.pad(BOOKS[w.format], (0, LANES - 16))
        operands["book"] = jnp.asarray(np.tile(book, (SUBLANES, 1)))
    if low is not None:
        operands["u"], operands["v"] = low[0].reshape(plan.rank, plan.m), low[1]
    return _call(plan, operands, interpret).reshape(*x.shape[:-1], plan.columns)


def _summed_block(size: int, whole: bool) -> int:
    """A tile's size on the summed axis; a divisor of the axis if there is a good one.

    Args:
        size: of the axis.
        whole: whether one tile may take a whole axis that does not fill registers: the rows of W,
            but not its columns, which are looked up by registers.
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


def _call(plan: Plan, operands: dict[str, Any], interpret: Any) -> jax.Array:
    rows, columns = plan.tile
    last = plan.steps - 1

    def tile(j: Any, k: Any) -> tuple[Any, Any]:
        """Block of W that step k decodes."""
        k = jnp.minimum(k, last)
        return (j, k) if plan.transposed else (k, j)

    has_own_scales = plan.scale_rows < plan.groups
    scale_spec = pl.BlockSpec(
        (plan.scale_rows, columns),
        lambda i, j, k: tile(j, k) if has_own_scales else (0, tile(j, k)[1]),
    )
    specs = {
        "x": pl.BlockSpec((plan.bm, plan.bk), lambda i, j, k: (i, jnp.maximum(k - 1, 0))),
        "codes": pl.BlockSpec((rows // (1 + plan.packed), columns), lambda i, j, k: tile(j, k)),
        "scale": scale_spec,
        "zero": scale_spec,
        "book": pl.BlockSpec((SUBLANES, LANES), lambda i, j, k: (0, 0)),
        "u": pl.BlockSpec((plan.rank, plan.bm), lambda i, j, k: (0, i)),
        "v": pl.BlockSpec((plan.rank, plan.bn), lambda i, j, k: (0, j)),
    }
    grid = (pl.cdiv(plan.m, plan.bm), pl.cdiv(plan.columns, plan.bn), plan.steps + 1)
    read = {name: array.nbytes for name, array in operands.items()}
    moved = grid[1] * read["x"] + grid[0] * (sum(read.values()) - read["x"])
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.m, plan.columns), plan.dtype),
        grid=grid,
        in_specs=[{name: specs[name] for name in operands}],
        out_specs=pl.BlockSpec((plan.bm, plan.bn), lambda i, j, k: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((plan.bm, plan.bn), jnp.float32),
            pltpu.VMEM((2, rows, columns), plan.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * plan.columns * (plan.contracted + plan.rank),
            bytes_accessed=moved + plan.m * plan.columns * plan.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"{plan.format}_matmul" + ("_transposed" if plan.transposed else ""),
    )(operands)


def _kernel(refs: dict[str, Any], out: Any, sums: Any, tiles: Any, *, plan: Plan) -> None:
    j, k = pl.program_id(1), pl.program_id(2)
    half = jax.lax.rem(k, 2)
    size = plan.bm // plan.chunks
    units = plan.tile[0] // plan.unit
    share = pl.cdiv(units, plan.chunks)
    first_row = (j if plan.transposed else jnp.minimum(k, plan.steps - 1)) * plan.tile[0]
    first_row = 0 if plan.scale_rows < plan.groups else first_row

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
            sums[rows, :] = jax.lax.dot_general(
                refs["u"][:, rows],
                refs["v"][...],
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        else:
            sums[rows, :] = jnp.zeros((size, plan.bn), jnp.float32)

    def multiply(rows: Any) -> None:
        x = refs["x"][rows, :]
        if plan.is_ragged:
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
    refs: dict[str, Any], tiles: Any, half: Any, unit: Any, first_row: Any, k: Any, plan: Plan
) -> None:
    """Decodes one unit of rows of the current tile of W into one half of the buffer."""
    for start in range(0, plan.unit, STRIP):
        rows = min(STRIP, plan.unit - start)
        if plan.packed:
            codes = refs["codes"][pl.ds(pl.multiple_of(unit * STRIP, STRIP), STRIP), :]
            codes = codes.astype(jnp.int32)
            codes = codes >> 4 if start else codes & 15
        else:
            codes = refs["codes"][pl.ds(unit * plan.unit + start, rows), :].astype(jnp.int32)
        row = unit * plan.unit + start
        # Rows past the end of W belong to no group; what they become is not kept.
        group = jax.lax.div(first_row + row, plan.group_rows)
        group = pl.ds(jnp.minimum(group, plan.scale_rows - 1), 1)
        scale = refs["scale"][group, :]
        if plan.format in BOOKS:
            values = _look_up(codes, refs["book"][...])
        elif "zero" in refs:
            values = codes.astype(jnp.float32) - refs["zero"][group, :]
        else:
            values = (codes - (MIDDLE if plan.packed else 0)).astype(jnp.float32)
        values *= scale
        if plan.is_ragged and plan.transposed:
            column = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            left = plan.contracted - jnp.minimum(k, plan.steps - 1) * plan.bk
            values = jnp.where(column < left, values, 0)
        tiles[half, pl.ds(row, rows), :] = values.astype(tiles.dtype)


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
