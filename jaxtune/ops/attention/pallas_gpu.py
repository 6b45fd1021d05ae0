"""Flash attention for NVIDIA GPUs: Pallas kernels of our own, compiled by Triton.

Forward is FlashAttention-2 (arXiv 2307.08691, algorithm 1): a program holds a block of queries of
one head and walks over blocks of keys with a running maximum and sum. Backward (algorithm 2)
recomputes the weights from the log-sum-exp, in two kernels: dq walks over the keys, dk and dv walk
over the queries of all heads that share a key head. No program adds to memory that another one
writes, so gradients are deterministic, and keys are never repeated for their group.

Which blocks a program visits is a list that XLA makes from the mask (as in FlexAttention,
arXiv 2412.05496): first those of which it sees a part, where every score is masked, then those it
sees whole, where none is. A block that is not seen costs nothing, wherever it lies.

Logits are kept in base 2, because the hardware's exponential is, except with ALiBi: there they are
large, and a change of base would round them once more.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxtune.hlo import notes
from jaxtune.ops.attention import flash
from jaxtune.ops.attention.blocks import seen_blocks
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED, Mask, visible

LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys of a block, and how Triton runs the program: warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# By head size, for two-byte operands: what compiles for A100, H100 and RTX 4090 without register
# spills (but 32 bytes in dk, dv of head size 64 on A100). Shared memory holds stages x (k and v) of
# a block, 99 KiB on consumer cards; registers, 64 Ki of a multiprocessor, the float32 sums.
FORWARD_TILES = {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)}
BACKWARD_TILES = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)}


class Visits(NamedTuple):
    """The blocks that each program visits; in a kernel, refs without the batch axis.

    order: int32 [B or 1, blocks, other blocks]: those seen in part, then those seen whole.
    partial, total: int32 [B or 1, blocks]: how many are seen in part, and at all.
    """

    order: Any
    partial: Any
    total: Any


class Shared(NamedTuple):
    """What every kernel is given; in a kernel, refs without the batch axis.

    alibi: [N] or None; offset: int32 [1], the position of the first query.
    """

    visits: Visits
    mask: Mask
    alibi: Any
    offset: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call while tracing.

    Attributes:
        b, t, s, n, h: sizes, not rounded up.
        group: query heads per key head.
        tile: sizes of the blocks.
        scale, softcap, softmax_dtype: see `flash.Operands`.
        unit: how many of the kernels' logits are a natural one.
    """

    b: int
    t: int
    s: int
    n: int
    h: int
    group: int
    tile: Tile
    scale: float
    softcap: float | None
    softmax_dtype: Any
    unit: float

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return pl.cdiv(self.t, self.tile.queries), pl.cdiv(self.s, self.tile.keys)

    def exp(self, x: jax.Array) -> jax.Array:
        """The exponential of the kernels' logits."""
        return jnp.exp(x) if self.unit == 1 else jnp.exp2(x)


def forward(
    operands: Operands, *, tile: Tile | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in q's dtype and log-sum-exp float32 [B, T, N]; see `flash.Passes`.

    Args:
        operands: see `flash.Operands`.
        tile: sizes of the blocks; None: those for the head size.
        interpret: run as plain JAX on any platform, slowly (for tests).

    Raises:
        NotImplementedError: the head size is over 256, or there is a bias by distance.
    """
    call = _describe(operands, tile, FORWARD_TILES)
    some, every = _seen(operands, call)
    with notes.flops(2 * _product_flops(operands)):
        found = _run(
            _forward_kernel,
            call,
            (call.blocks[0], call.n),
            _shared(operands, some, every),
            {"sinks": operands.sinks, "q": operands.q, "k": operands.k, "v": operands.v},
            {"y": operands.q, "lse": jax.ShapeDtypeStruct((call.b, call.n, call.t), jnp.float32)},
            interpret,
        )
    return found["y"], found["lse"].transpose(0, 2, 1)


def backward(
    operands: Operands,
    lse: jax.Array,
    dy: jax.Array,
    delta: jax.Array,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in the dtypes of q, k and v; see `flash.Passes` and `forward`."""
    call = _describe(operands, tile, BACKWARD_TILES)
    some, every = _seen(operands, call)
    q, k, v = operands.q, operands.k, operands.v
    arrays = {"q": q, "k": k, "v": v, "dy": dy.astype(q.dtype)}
    arrays |= {"lse": lse.transpose(0, 2, 1), "delta": delta.transpose(0, 2, 1)}
    by_queries = _shared(operands, some, every)
    by_keys = _shared(operands, some.swapaxes(1, 2), every.swapaxes(1, 2))
    blocks_q, blocks_k = call.blocks
    grid = blocks_q, call.n
    with notes.flops(3 * _product_flops(operands)):
        found = _run(_dq_kernel, call, grid, by_queries, arrays, {"dq": q}, interpret)
    grid = blocks_k, call.n // call.group
    with notes.flops(4 * _product_flops(operands)):
        found |= _run(_dkv_kernel, call, grid, by_keys, arrays, {"dk": k, "dv": v}, interpret)
    return found["dq"], found["dk"], found["dv"]


attend = functools.partial(flash.attend, flash.Passes(forward, backward))


def _product_flops(operands: Operands) -> float:
    """FLOPs of one product that makes, or contracts, the scores that the mask leaves at most."""
    (b, t, n, h), s = operands.q.shape, operands.k.shape[1]
    return 2 * b * n * t * s * h * (0.5 if operands.mask.causal else 1.0)


def _seen(operands: Operands, call: Call) -> tuple[Any, Any]:
    """`blocks.seen_blocks`; blocks that go beyond the last query count as seen in part."""
    sizes = call.tile.queries, call.tile.keys
    some, every = seen_blocks(operands.mask, operands.query_offset, (call.t, call.s), sizes)
    whole = np.arange(1, call.blocks[0] + 1) * call.tile.queries <= call.t
    return some, every & whole[:, None]


def listed(some: Any, every: Any) -> Visits:
    """The visits of each block of the second axis, from the booleans of `blocks.seen_blocks`."""
    xp = np if isinstance(some, np.ndarray) else jnp
    kind = xp.where(some, xp.where(every, 1, 0), 2)
    order = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
    partial = (some & ~every).sum(axis=-1, dtype=np.int32)
    return Visits(order, partial, some.sum(axis=-1, dtype=np.int32))


def _describe(operands: Operands, tile: Tile | None, tiles: dict[int, Tile]) -> Call:
    """The call's sizes, with blocks no longer than short rows need."""
    b, t, n, h = operands.q.shape
    s, heads = operands.k.shape[1:3]
    flash.refuse("pallas_gpu", operands, "relative")
    if h > 256:
        raise NotImplementedError(f"head size {h} is over 256: k and v exceed shared memory")
    if tile is None:
        tile = tiles[max(64, pl.next_power_of_2(h))]
        dtypes = operands.q.dtype, jnp.dtype(operands.softmax_dtype)
        if max(dtype.itemsize for dtype in dtypes) > 2:
            tile = Tile(tile.queries // 2, tile.keys // 2, 8, 2)
    rows = min(tile.queries, max(16, pl.next_power_of_2(t)))
    cols = min(tile.keys, max(16, pl.next_power_of_2(s)))
    return Call(
        b=b,
        t=t,
        s=s,
        n=n,
        h=h,
        group=n // heads,
        tile=tile._replace(queries=rows, keys=cols),
        scale=operands.scale,
        softcap=operands.softcap,
        softmax_dtype=operands.softmax_dtype,
        unit=LOG2E if operands.alibi is None else 1.0,
    )


def _shared(operands: Operands, some: Any, every: Any) -> Shared:
    offset = jnp.asarray(operands.query_offset, jnp.int32).reshape(1)
    return Shared(listed(some, every), operands.mask, operands.alibi, offset)


def _run(
    kernel: Callable,
    call: Call,
    grid: tuple[int, int],
    shared: Shared,
    arrays: dict[str, Any],
    outputs: dict[str, Any],
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs a kernel for each block and head of `grid` and each row of the batch.

    Every ref is a whole row of the batch: Triton computes addresses from it and loads what the
    kernel asks for. Its axes are rounded up to whole blocks and, for heads, to the power of two
    that Triton needs; what lies outside of the array is masked when it is loaded.
    """

    def row(*shape: int, batched: bool = True) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda i, j, b: (b if batched else 0, *zeros))

    def whole(x: Any) -> pl.BlockSpec | None:
        return None if x is None else pl.BlockSpec(x.shape, lambda i, j, b: (0,))

    def at_row(x: jax.Array) -> pl.BlockSpec:
        return row(*x.shape[1:], batched=x.shape[0] > 1)

    rows, cols = call.blocks[0] * call.tile.queries, call.blocks[1] * call.tile.keys
    h = max(16, pl.next_power_of_2(call.h))
    queries, keys = row(rows, call.n, h), row(cols, call.n // call.group, h)
    sums = row(call.n, rows)
    specs = {"sinks": whole(arrays.get("sinks")), "lse": sums, "delta": sums}
    specs |= dict.fromkeys(("q", "dy", "y", "dq"), queries)
    specs |= dict.fromkeys(("k", "v", "dk", "dv"), keys)
    mask = jax.tree.map(lambda _: row(cols), shared.mask)
    if mask.query_segments is not None:
        mask = dataclasses.replace(mask, query_segments=row(rows))
    visits = jax.tree.map(at_row, shared.visits)
    of_shared = Shared(visits, mask, whole(shared.alibi), whole(shared.offset))
    return pl.pallas_call(
        functools.partial(kernel, call=call),
        grid=(*grid, call.b),
        in_specs=[of_shared, {name: specs[name] for name in arrays}],
        out_specs={name: specs[name] for name in outputs},
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(call.tile.warps, call.tile.stages),
        interpret=interpret,
    )(shared, arrays)


def _forward_kernel(shared: Shared, arrays: dict, outputs: dict, *, call: Call) -> None:
    """A block of queries of one head: y [rows, H] and lse [rows]."""
    rows, cols = call.tile.queries, call.tile.keys
    head, key_head = pl.program_id(1), lax.div(pl.program_id(1), call.group)
    block = pl.num_programs(0) - 1 - pl.program_id(0)  # under a causal mask, longest first
    start = block * rows
    q = _load(arrays["q"], start, rows, head, call.t, call.h)
    slope = None if shared.alibi is None else shared.alibi[head]

    def visit(key_block: jax.Array, carry: Any, masked: bool) -> Any:
        y, top, total = carry
        at, ends = key_block * cols, call.s if masked else None
        k = _load(arrays["k"], at, cols, key_head, ends, call.h)
        x, _ = _logits(call, shared, _dot(q, k.T), start, at, slope, masked)
        v = _load(arrays["v"], at, cols, key_head, ends, call.h)
        new_top = jnp.maximum(top, x.max(axis=1))
        weights = call.exp(x - new_top[:, None])
        shrink = call.exp(top - new_top)
        more = _dot(weights.astype(call.softmax_dtype), v.astype(call.softmax_dtype))
        return y * shrink[:, None] + more, new_top, total * shrink + weights.sum(axis=1)

    y = jnp.zeros((rows, q.shape[1]), jnp.float32)
    top, total = jnp.full((rows,), MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32)
    if arrays["sinks"] is not None:  # a key of every query, whose value is zero
        top = jnp.broadcast_to(arrays["sinks"][head] * call.unit, (rows,))
        total = jnp.ones((rows,), jnp.float32)
    y, top, total = _walk(shared.visits, block, visit, (y, top, total))
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    _store(outputs["y"], start, head, y / total[:, None], call.t, call.h)
    lse = jnp.where(nothing, MASKED, top * (1 / call.unit) + jnp.log(total))
    inside = start + jnp.arange(rows) < call.t
    plgpu.store(outputs["lse"].at[head, pl.ds(start, rows)], lse, mask=inside)


def _dq_kernel(shared: Shared, arrays: dict, outputs: dict, *, call: Call) -> None:
    """A block of queries of one head: dq [rows, H]."""
    rows, cols = call.tile.queries, call.tile.keys
    head, key_head = pl.program_id(1), lax.div(pl.program_id(1), call.group)
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    start = block * rows
    q = _load(arrays["q"], start, rows, head, call.t, call.h)
    dy = _load(arrays["dy"], start, rows, head, call.t, call.h)
    lse = _load_row(arrays["lse"].at[head, pl.ds(start, rows)], start, call.t)
    delta = _load_row(arrays["delta"].at[head, pl.ds(start, rows)], start, call.t)
    slope = None if shared.alibi is None else shared.alibi[head]

    def visit(key_block: jax.Array, dq: jax.Array, masked: bool) -> jax.Array:
        at, ends = key_block * cols, call.s if masked else None
        k = _load(arrays["k"], at, cols, key_head, ends, call.h)
        v = _load(arrays["v"], at, cols, key_head, ends, call.h)
        x, dcap = _logits(call, shared, _dot(q, k.T), start, at, slope, masked)
        dx = call.exp(x - lse[:, None] * call.unit) * (_dot(dy, v.T) - delta[:, None])
        dx = dx if dcap is None else dx * dcap
        return dq + _dot(dx.astype(k.dtype), k)

    dq = _walk(shared.visits, block, visit, jnp.zeros((rows, q.shape[1]), jnp.float32))
    _store(outputs["dq"], start, head, dq * call.scale, call.t, call.h)


def _dkv_kernel(shared: Shared, arrays: dict, outputs: dict, *, call: Call) -> None:
    """A block of keys of one key head: dk and dv [cols, H], summed over the group's queries."""
    rows, cols = call.tile.queries, call.tile.keys
    block, key_head = pl.program_id(0), pl.program_id(1)
    at = block * cols
    k = _load(arrays["k"], at, cols, key_head, call.s, call.h)
    v = _load(arrays["v"], at, cols, key_head, call.s, call.h)

    def of_head(member: jax.Array, carry: Any) -> Any:
        head = key_head * call.group + member
        slope = None if shared.alibi is None else shared.alibi[head]

        def visit(query_block: jax.Array, carry: Any, masked: bool) -> Any:
            dk, dv = carry
            start, ends = query_block * rows, call.t if masked else None
            q = _load(arrays["q"], start, rows, head, ends, call.h)
            dy = _load(arrays["dy"], start, rows, head, ends, call.h)
            lse = _load_row(arrays["lse"].at[head, pl.ds(start, rows)], start, ends)
            delta = _load_row(arrays["delta"].at[head, pl.ds(start, rows)], start, ends)
            x, dcap = _logits(call, shared, _dot(k, q.T), start, at, slope, masked, key_axis=0)
            weights = call.exp(x - lse[None] * call.unit)
            dv += _dot(weights.astype(call.softmax_dtype), dy.astype(call.softmax_dtype))
            dx = weights * (_dot(v, dy.T) - delta[None])
            dx = dx if dcap is None else dx * dcap
            return dk + _dot(dx.astype(q.dtype), q), dv

        return _walk(shared.visits, block, visit, carry)

    zeros = jnp.zeros((cols, k.shape[1]), jnp.float32)
    dk, dv = lax.fori_loop(0, call.group, of_head, (zeros, zeros))
    _store(outputs["dk"], at, key_head, dk * call.scale, call.s, call.h)
    _store(outputs["dv"], at, key_head, dv, call.s, call.h)


def _walk(visits: Visits, block: jax.Array, visit: Callable, carry: Any) -> Any:
    """carry = visit(other block, carry, masked) for each visit of a block."""

    def step(masked: bool) -> Callable:
        return lambda i, carry: visit(visits.order[block, i], carry, masked)

    partial, total = visits.partial[block], visits.total[block]
    carry = lax.fori_loop(0, partial, step(True), carry)
    return lax.fori_loop(partial, total, step(False), carry)


def _logits(
    call: Call,
    shared: Shared,
    dots: jax.Array,
    start: jax.Array,
    at: jax.Array,
    slope: jax.Array | None,
    masked: bool,
    key_axis: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
    """Logits of the queries from `start` and keys from `at` on; slope of the soft-cap."""
    rows, cols, mask = call.tile.queries, call.tile.keys, shared.mask
    x, dcap = dots * (call.scale * call.unit), None
    if call.softcap is not None:
        capped = jnp.tanh(dots * (call.scale / call.softcap))
        x, dcap = capped * (call.softcap * call.unit), 1 - capped * capped
    positions = jnp.expand_dims(shared.offset[0] + start + jnp.arange(rows), key_axis)
    keys = jnp.expand_dims(at + jnp.arange(cols), 1 - key_axis)
    if slope is not None:
        distance = jnp.abs(positions - (keys - mask.prefix)).astype(jnp.float32)
        x -= jnp.where(keys < mask.prefix, 0.0, distance * slope)
    if not masked:
        return x, dcap

    def of_keys(ref: Any) -> jax.Array:
        return jnp.expand_dims(_load_row(ref.at[pl.ds(at, cols)], at, call.s), 1 - key_axis)

    here = jax.tree.map(of_keys, dataclasses.replace(mask, query_segments=None))
    if mask.query_segments is not None:
        ids = _load_row(mask.query_segments.at[pl.ds(start, rows)], start, call.t)
        here = dataclasses.replace(here, query_segments=jnp.expand_dims(ids, key_axis))
    sees, inside = visible(here, positions, keys), keys < call.s
    return jnp.where(inside if sees is None else sees & inside, x, -jnp.inf), dcap


def _load(
    ref: Any, start: jax.Array, size: int, head: jax.Array, end: int | None, h: int
) -> jax.Array:
    """[size, H padded] of one head of a ref [rows, heads, H padded]; zero outside of the array.

    `end` is the array's length, or None where all rows lie inside.
    """
    mask = None
    if end is not None and end % size:
        mask = (start + jnp.arange(size) < end)[:, None]
    if h != ref.shape[-1]:
        in_head = (jnp.arange(ref.shape[-1]) < h)[None]
        mask = in_head if mask is None else mask & in_head
    ref = ref.at[pl.ds(start, size), head, :]
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)


def _load_row(ref: Any, start: jax.Array, end: int | None) -> jax.Array:
    """All of a ref [size] that lies at `start` of an array of length `end`; zero outside of it."""
    size = ref.shape[0]
    if end is None or end % size == 0:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=start + jnp.arange(size) < end, other=0)


def _store(ref: Any, start: jax.Array, head: jax.Array, value: jax.Array, end: int, h: int) -> None:
    """Stores [size, H padded] as one head of a ref [rows, heads, H padded]."""
    inside = (start + jnp.arange(value.shape[0]) < end)[:, None]
    inside &= (jnp.arange(value.shape[1]) < h)[None]
    ref = ref.at[pl.ds(start, value.shape[0]), head, :]
    plgpu.store(ref, value.astype(ref.dtype), mask=inside)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product in float32, whose operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plgpu.dot(x, y, precision=precision)
