"""Forward pass of attention on a TPU: a block of queries walks over the blocks of keys it sees.

FlashAttention-2 (arXiv 2307.08691, algorithm 1): running maximum, sum and output of each query stay
in VMEM from the first of its blocks of keys to the last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.attention import blocks
from jaxtune.ops.attention import pallas_tpu_scores as common
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED
from jaxtune.ops.attention.pallas_tpu_scores import HIDDEN, LANES, Operand, Refs, Sizes


def forward(
    operands: Operands, sizes: Sizes, interpret: common.Interpret
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp float32 [B, T, N]; see `pallas_tpu.forward`."""
    b, t, n, h = operands.q.shape
    s, kv = operands.k.shape[1:3]
    group = n // kv
    steps = common.plan(operands, sizes, keys=slice(None))

    def at(b: Any, head: Any, step: Any, words: Any, offset: Any) -> tuple:
        query, key, _ = blocks.unpack(steps.word(words, b, step))
        return b, head, query, key

    def of_query(*grid: Any) -> tuple:
        b, head, query, _ = at(*grid)
        return b, head, query, 0

    def of_key(*grid: Any) -> tuple:
        b, head, _, key = at(*grid)
        return b, lax.div(head, group), key, 0

    def lse_at(*grid: Any) -> tuple:
        b, head, query, _ = at(*grid)
        return b, head, 0, query

    q_spec = pl.BlockSpec((None, None, sizes.queries, h), of_query)
    k_spec = pl.BlockSpec((None, None, sizes.keys, h), of_key)
    call = {
        "q": Operand(common.heads_first(operands.q, sizes.queries), q_spec),
        "k": Operand(common.heads_first(operands.k, sizes.keys), k_spec),
        "v": Operand(common.heads_first(operands.v, sizes.keys), k_spec),
    }
    call |= common.mask_operands(
        operands.mask, sizes, lambda *grid: at(*grid)[::2], lambda *grid: at(*grid)[::3]
    )
    for name in ("sinks", "alibi"):
        array = getattr(operands, name)
        if array is not None:
            call[name] = Operand(array, pl.BlockSpec(memory_space=pltpu.SMEM))
    rows = call["q"].array.shape[2]
    out_shape = {
        "y": jax.ShapeDtypeStruct((b, n, rows, h), operands.q.dtype),
        "lse": jax.ShapeDtypeStruct((b, n, 1, rows), jnp.float32),
    }
    lanes = min(sizes.part, LANES)
    scratch = {
        "top": pltpu.VMEM((sizes.queries, lanes), jnp.float32),
        "total": pltpu.VMEM((sizes.queries, lanes), jnp.float32),
        "sum": pltpu.VMEM((sizes.queries, h), jnp.float32),
    }
    if "query_segments" in call:
        scratch["segments"] = pltpu.VMEM((sizes.queries, lanes), jnp.int32)
    names = [*call, *out_shape, *scratch]

    def kernel(words: Any, offset: Any, *refs: Any) -> None:
        _kernel(operands, sizes, steps, (words, offset), dict(zip(names, refs, strict=True)))

    pairs = b * n * t * s * (0.5 if operands.mask.causal else 1.0)
    out = pl.pallas_call(
        kernel,
        out_shape=list(out_shape.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, n, steps.count),
            in_specs=[operand.spec for operand in call.values()],
            out_specs=[q_spec, pl.BlockSpec((None, None, 1, sizes.queries), lse_at)],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(4 * pairs * h),
            transcendentals=int(pairs),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (operands.q, operands.k) * 2),
        ),
        interpret=interpret,
        name="attention_forward",
    )(steps.words, steps.offset, *(operand.array for operand in call.values()))
    y, lse = out
    return y[:, :, :t].transpose(0, 2, 1, 3), lse[:, :, 0, :t].transpose(0, 2, 1)


def _kernel(
    operands: Operands, sizes: Sizes, steps: common.Steps, scalars: tuple[Any, Any], refs: Refs
) -> None:
    """One step: a block of queries meets a block of keys."""
    words, offset = scalars
    head = pl.program_id(1)
    word = steps.word(words, pl.program_id(0), pl.program_id(2))
    query, key, flags = blocks.unpack(word)
    top, total, out = refs["top"], refs["total"], refs["sum"]
    lanes, h = top.shape[1], out.shape[1]

    @common.when(flags, blocks.FIRST)
    def _() -> None:
        if operands.sinks is None:
            top[...], total[...] = jnp.full(top.shape, MASKED), jnp.zeros_like(total)
        else:  # one more logit: the maximum so far, and a sum of 1, in the first lane
            top[...] = jnp.full(top.shape, refs["sinks"][head] * common.base(operands))
            lane = lax.broadcasted_iota(jnp.int32, total.shape, 1)
            total[...] = jnp.where(lane == 0, 1.0, 0.0)
        out[...] = jnp.zeros_like(out)
        if "segments" in refs:
            refs["segments"][...] = common.column(refs["query_segments"][...], lanes)

    def meet(partly: bool) -> None:
        q = refs["q"][...]
        tops, totals = top[...], total[...]
        for inside in range(0, sizes.keys, sizes.part):
            part = pl.ds(inside, sizes.part)
            scores = common.Scores(
                operands,
                refs,
                (offset[0] + query * sizes.queries, key * sizes.keys + inside),
                inside,
                (sizes.queries, sizes.part),
                transposed=False,
            )
            logits, _ = scores.logits(common.dot(q, refs["k"][part, :], (1, 1)), head)
            seen = scores.seen() if partly else None
            if seen is not None:
                logits = jnp.where(seen, logits, HIDDEN)
            higher = jnp.maximum(tops, logits.max(axis=1, keepdims=True))
            weights = common.power(operands, logits - common.spread(higher, sizes.part))
            fade = common.power(operands, tops - higher)
            tops = higher
            # Sums stay apart by lane until the last block.
            totals = fade * totals + sum(
                weights[:, lane : lane + lanes] for lane in range(0, sizes.part, lanes)
            )
            dtype = operands.softmax_dtype
            values = refs["v"][part, :].astype(dtype)
            products = common.dot(weights.astype(dtype), values, (1, 0))
            out[...] = common.spread(fade, h) * out[...] + products
        top[...], total[...] = tops, totals

    common.when(flags, blocks.RUN | blocks.PARTLY, blocks.RUN)(lambda: meet(partly=False))
    common.when(flags, blocks.PARTLY)(lambda: meet(partly=True))

    @common.when(flags, blocks.LAST)
    def _() -> None:
        sums = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
        some = sums > 0
        share = jnp.where(some, 1 / jnp.where(some, sums, 1), 0)
        refs["y"][...] = (out[...] * common.spread(share, h)).astype(refs["y"].dtype)
        logs = top[...] / common.base(operands) + jnp.log(jnp.where(some, sums, 1))
        refs["lse"][...] = jnp.where(some, logs, MASKED).T[:1]
