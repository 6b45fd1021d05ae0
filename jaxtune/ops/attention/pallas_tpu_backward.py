"""Backward pass of attention on a TPU: dq, dk and dv in one walk over the blocks.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) computes scores and their gradient once for each
block, five products in all, but adds to dk and dv (or dq) of another block each time. Here the
gradients of all keys stay in VMEM, in float32, while the queries of all heads that share the key
head walk over them, so nothing is summed in HBM. Where VMEM does not hold them, keys are taken span
by span, one call each, and only dq is handed from call to call.

Blocks of scores are transposed, [keys, queries]: so dk and dv are plain products, what is known for
each query is a row that broadcasts over sublanes, and only the product for dq has a transposed
operand.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.attention import blocks
from jaxtune.ops.attention import pallas_tpu_scores as common
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED
from jaxtune.ops.attention.pallas_tpu_scores import Operand, Refs, Sizes


class Held(NamedTuple):
    """What the backward kernel holds in VMEM.

    Attributes:
        keys: so many, a multiple of a block, have their gradients held at a time.
        vmem_limit: bytes that the compiler may use; None: its default.
    """

    keys: int
    vmem_limit: int | None = None


def backward(
    operands: Operands,
    saved: tuple[jax.Array, jax.Array, jax.Array],
    sizes: Sizes,
    held: Held,
    interpret: common.Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv; see `pallas_tpu.backward`.

    Args:
        operands: those of the forward pass.
        saved: lse and delta, float32 [B, T, N], and dy [B, T, N, H].
        sizes: of the blocks.
        held: in VMEM.
        interpret: see `pallas_tpu`.
    """
    lse, delta, dy = saved
    t, s = operands.q.shape[1], operands.k.shape[1]
    # Where nothing is seen, and in the filling, the power of (logits - lse) is to be 0.
    lse = jnp.where(lse <= MASKED / 2, -MASKED, lse * common.base(operands)).transpose(0, 2, 1)[
        :, :, None
    ]
    rows = {
        "lse": common.padded(lse, 3, sizes.queries, -MASKED),
        "delta": common.padded(delta.transpose(0, 2, 1)[:, :, None], 3, sizes.queries),
        "q": common.heads_first(operands.q, sizes.queries),
        "dy": common.heads_first(dy, sizes.queries),
        "k": common.heads_first(operands.k, sizes.keys),
        "v": common.heads_first(operands.v, sizes.keys),
    }
    count = -(-s // sizes.keys)
    per_span = held.keys // sizes.keys
    spans = [range(i, min(i + per_span, count)) for i in range(0, count, per_span)]
    dq = jnp.zeros(rows["q"].shape, jnp.float32) if len(spans) > 1 else None
    parts = []
    for keys in spans:
        dq, dk, dv = _span(operands, rows, dq, keys, sizes, held.vmem_limit, interpret)
        parts.append((dk, dv))
    assert dq is not None
    dq = dq[:, :, :t].astype(operands.q.dtype)
    dk, dv = (jnp.concatenate(x, axis=2)[:, :, :s] for x in zip(*parts, strict=True))
    return dq.transpose(0, 2, 1, 3), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)


def _span(
    operands: Operands,
    rows: dict[str, jax.Array],
    dq: jax.Array | None,
    keys: range,
    sizes: Sizes,
    vmem_limit: int | None,
    interpret: common.Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq so far (float32) or, if it is None, dq; dk and dv of the given blocks of keys."""
    b, n, t, h = rows["q"].shape
    kv = rows["k"].shape[1]
    group = n // kv
    steps = common.plan(operands, sizes, keys=slice(keys.start, keys.stop), writes=len(keys))

    def at(b: Any, head: Any, member: Any, step: Any, words: Any, offset: Any) -> tuple:
        query, key, flags = blocks.unpack(steps.word(words, b, step))
        return b, head * group + member, query, key, flags

    def of_query(*grid: Any) -> tuple:
        b, head, query, _, _ = at(*grid)
        return b, head, query, 0

    def row_of_query(*grid: Any) -> tuple:
        b, head, query, _, _ = at(*grid)
        return b, head, 0, query

    def of_key(*grid: Any) -> tuple:
        b, _, _, key, _ = at(*grid)
        return b, grid[1], keys.start + key, 0

    def gradient_of_key(*grid: Any) -> tuple:
        b, _, _, key, flags = at(*grid)
        writes = ((flags & blocks.WRITE) != 0) & (grid[2] == group - 1)
        return b, grid[1], jnp.where(writes, key, 0), 0

    specs = {
        "row": pl.BlockSpec((None, None, 1, sizes.queries), row_of_query),
        "query": pl.BlockSpec((None, None, sizes.queries, h), of_query),
        "key": pl.BlockSpec((None, None, sizes.keys, h), of_key),
    }
    kinds = {"lse": "row", "delta": "row", "q": "query", "dy": "query", "k": "key", "v": "key"}
    call = {name: Operand(rows[name], specs[kind]) for name, kind in kinds.items()}
    call |= common.mask_operands(
        operands.mask,
        sizes,
        lambda *grid: at(*grid)[:3:2],
        lambda *grid: (grid[0], keys.start + at(*grid)[3]),
    )
    if operands.alibi is not None:
        call["alibi"] = Operand(operands.alibi, pl.BlockSpec(memory_space=pltpu.SMEM))
    if dq is not None:
        call["dq_before"] = Operand(dq, specs["query"])
    gradient = pl.BlockSpec((None, None, sizes.keys, h), gradient_of_key)
    held = len(keys) * sizes.keys
    out_shape = {
        "dq": jax.ShapeDtypeStruct((b, n, t, h), operands.q.dtype if dq is None else dq.dtype),
        "dk": jax.ShapeDtypeStruct((b, kv, held, h), operands.k.dtype),
        "dv": jax.ShapeDtypeStruct((b, kv, held, h), operands.v.dtype),
    }
    scratch = {
        "dq_sum": pltpu.VMEM((sizes.queries, h), jnp.float32),
        "dk_sum": pltpu.VMEM((held, h), jnp.float32),
        "dv_sum": pltpu.VMEM((held, h), jnp.float32),
    }
    names = [*call, *out_shape, *scratch]

    def kernel(words: Any, offset: Any, *refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        _kernel(operands, sizes, steps, (words, offset), keys.start, named)

    pairs = b * n * t * held * (0.5 if operands.mask.causal else 1.0)
    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=list(out_shape.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(b, kv, group, steps.count),
                in_specs=[operand.spec for operand in call.values()],
                out_specs=[specs["query"], gradient, gradient],
                scratch_shapes=list(scratch.values()),
            ),
            input_output_aliases={} if dq is None else {2 + len(call) - 1: 0},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=vmem_limit,
            ),
            cost_estimate=pl.CostEstimate(
                flops=int(10 * pairs * h),
                transcendentals=int(pairs),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in rows.values()),
            ),
            interpret=interpret,
            name="attention_backward",
        )(steps.words, steps.offset, *(operand.array for operand in call.values()))
    )


def _kernel(
    operands: Operands,
    sizes: Sizes,
    steps: common.Steps,
    scalars: tuple[Any, Any],
    first_key: int,
    refs: Refs,
) -> None:
    """One step: a block of queries meets a block of keys, or a block of dk and dv is written."""
    words, offset = scalars
    batch, kv, member, step = (pl.program_id(axis) for axis in range(4))
    query, key, flags = blocks.unpack(steps.word(words, batch, step))
    dq, dk, dv = refs["dq_sum"], refs["dk_sum"], refs["dv_sum"]
    members = pl.num_programs(2)

    @pl.when((member == 0) & (step == 0))
    def _() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    @common.when(flags, blocks.FIRST)
    def _() -> None:
        dq[...] = jnp.zeros_like(dq)

    def meet(partly: bool) -> None:
        q, dy = refs["q"][...], refs["dy"][...]
        lse, delta = refs["lse"][...], refs["delta"][...]
        dtype = operands.softmax_dtype
        for inside in range(0, sizes.keys, sizes.part):
            part = pl.ds(inside, sizes.part)
            k, v = refs["k"][part, :], refs["v"][part, :]
            scores = common.Scores(
                operands,
                refs,
                (offset[0] + query * sizes.queries, (first_key + key) * sizes.keys + inside),
                inside,
                (sizes.queries, sizes.part),
                transposed=True,
            )
            logits, derivative = scores.logits(common.dot(k, q, (1, 1)), kv * members + member)
            weights = common.power(operands, logits - lse)
            seen = scores.seen() if partly else None
            if seen is not None:
                weights = jnp.where(seen, weights, 0)
            at = pl.ds(pl.multiple_of(key * sizes.keys + inside, sizes.part), sizes.part)
            dv[at, :] += common.dot(weights.astype(dtype), dy.astype(dtype), (1, 0))
            dscores = weights * (common.dot(v, dy, (1, 1)) - delta)
            if derivative is not None:
                dscores *= derivative
            dscores = dscores.astype(q.dtype)
            dk[at, :] += common.dot(dscores, q, (1, 0))
            dq[...] += common.dot(dscores, k, (0, 0))

    common.when(flags, blocks.RUN | blocks.PARTLY, blocks.RUN)(lambda: meet(partly=False))
    common.when(flags, blocks.PARTLY)(lambda: meet(partly=True))

    @common.when(flags, blocks.LAST)
    def _() -> None:
        found = dq[...] * operands.scale
        if "dq_before" in refs:
            found += refs["dq_before"][...]
        refs["dq"][...] = found.astype(refs["dq"].dtype)

    @pl.when(((flags & blocks.WRITE) != 0) & (member == members - 1))
    def _() -> None:
        at = pl.ds(pl.multiple_of(key * sizes.keys, sizes.keys), sizes.keys)
        refs["dk"][...] = (dk[at, :] * operands.scale).astype(refs["dk"].dtype)
        refs["dv"][...] = dv[at, :].astype(refs["dv"].dtype)
