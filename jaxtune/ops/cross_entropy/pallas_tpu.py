"""TPU kernels: logits exist only as one block [tokens, vocabulary] in VMEM.

The forward kernel goes over the vocabulary once, as flash attention (arXiv 2205.14135) goes over
keys: the running maximum, the sum of exponentials, and, for dx, the expected row of w under the
softmax, rescaled when the maximum grows. The target's row of w is picked by a second product, of
the one-hot matrix, only in blocks in which a target lies: since tokens come sorted by target, few
of them. So loss and dx take two matrix products, and no gather of columns. dw needs the finished
log-sum-exp: a second kernel makes the logits again, block by block.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.cross_entropy.chunked import by_chunks
from jaxtune.ops.cross_entropy.form import Form, Parts

LOWEST = -1e30  # finite: the difference of two of them is a number
SLICE = 1024  # of D in one step of a loop inside a kernel: longer ones are code and compile time
BLOCKS = ((512, 768), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128), (64, 128))


def run(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    form: Form,
    *,
    of_x: bool,
    dw_dtype: jnp.dtype | None,
    interpret: bool = False,
) -> Parts:
    """See `chunked.run`; works fastest on tokens sorted by target.

    `interpret` runs the kernels as ordinary XLA, on any platform.
    """
    vocab = w.shape[0 if form.transposed else 1]
    rows_dtype = jnp.dtype(jnp.float32 if form.penalties.label_smoothing else w.dtype)
    per_token = x.dtype.itemsize + (4 + rows_dtype.itemsize) * of_x
    size, block = _block_sizes(x.shape[1], vocab, per_token, 2 * w.dtype.itemsize)
    statistics = functools.partial(
        _statistics, w=w, block=block, form=form, of_x=of_x, interpret=interpret
    )

    def chunk(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        top, total, at_target, logits, expected, rows = statistics(x, targets)
        sums, share = form.combine(*(column[:, 0] for column in (top, total, at_target, logits)))
        dx = None
        if of_x:
            of_expected = weights * (1 + 2 * form.penalties.z_loss * sums.lse) * share
            dx = expected * (of_expected / total[:, 0])[:, None] - rows * weights[:, None]
            dx = dx.astype(x.dtype)
        return (form.losses(sums), sums.at_target >= sums.top, sums.lse, dx), None

    rows, _ = by_chunks(chunk, _vmem_and_cores()[1] * size, (x, targets, weights), count)
    losses, correct, lse, dx = rows
    dw = None
    if dw_dtype is not None:
        dw = _weight_gradient(
            x, w, targets, weights, lse, count, form, dtype=dw_dtype, interpret=interpret
        )
    return Parts(losses, correct, dx, dw)


def _block_sizes(width: int, vocab: int, per_token: int, per_entry: int) -> tuple[int, int]:
    """Tokens and entries of the vocabulary in a block, as many as fit VMEM.

    Args:
        width: D.
        vocab: V.
        per_token: bytes of an element of all [tokens, D] that are held.
        per_entry: bytes of an element of all [entries, D] that are held.
    """
    for tokens, entries in BLOCKS:
        held = width * (tokens * per_token + entries * per_entry) + 16 * tokens * entries
        if held <= 0.9 * _vmem_and_cores()[0]:
            break
    # Blocks that divide the vocabulary leave no partial one: 768 divides 128,256.
    whole = [b for b in range(entries, entries // 2, -128) if vocab % b == 0]
    return tokens, min(whole[0] if whole else entries, -(-vocab // 128) * 128)


def _vmem_and_cores() -> tuple[int, int]:
    """Of the TPU this is traced for; if there is none, of the v4, whose limits all others keep."""
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:
        return 16 * 2**20, 2
    return chip.vmem_capacity_bytes, chip.num_cores


def _statistics(
    x: jax.Array,
    targets: jax.Array,
    *,
    w: jax.Array,
    block: int,
    form: Form,
    of_x: bool,
    interpret: bool,
) -> tuple:
    """Of C tokens [C, D]: largest logit, sum of exp(logit - it), target's logit, sum of logits.

    All are float32 [C, 1]. With `of_x` also float32 [C, D]: the gradient of the log of the sum
    times the sum, and that of what the target and label smoothing subtract from the loss.
    """
    (c, d), (_, cores) = x.shape, _vmem_and_cores()
    pad = -c % (16 * cores)  # a bfloat16 tile has 16 rows; each core takes a block of tokens
    x, targets = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(targets, (0, pad), constant_values=-1)
    vocab = w.shape[0 if form.transposed else 1]
    size, steps = x.shape[0] // cores, pl.cdiv(vocab, block)
    by_core = targets.reshape(cores, size)
    first = jnp.where(by_core >= 0, by_core, vocab).min(axis=1)
    # Without smoothing a row is one row of w, in which nothing is rounded.
    rows_dtype = jnp.float32 if form.penalties.label_smoothing else w.dtype
    shapes = [(1, jnp.float32)] * 4 + [(d, jnp.float32), (d, rows_dtype)] * of_x
    kernel = functools.partial(_statistics_kernel, form=form, vocab=vocab, steps=steps)
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], n), dtype) for n, dtype in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, steps),
            in_specs=[
                _resident(size, 1),
                _resident(size, d),
                _weight_spec(block, d, form, lambda i, j, *_: j),
            ],
            out_specs=[_resident(size, n) for n, _ in shapes],
        ),
        compiler_params=_compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * c * d * vocab * (1 + of_x),
            transcendentals=c * vocab,
            bytes_accessed=(cores * w.size + x.size) * w.dtype.itemsize + 4 * c * d * of_x,
        ),
        interpret=interpret,
        name="cross_entropy_forward",
    )(first, by_core.max(axis=1), targets[:, None], x, w)
    results = [r[:c] for r in results]
    return (*results, *([None, None] if not of_x else []))


def _statistics_kernel(
    first: jax.Array,
    last: jax.Array,
    targets: jax.Array,
    x: jax.Array,
    w: jax.Array,
    *outputs: jax.Array,
    form: Form,
    vocab: int,
    steps: int,
) -> None:
    top, total, at_target, logit_sum, *gradients = outputs
    i, j, smoothing = pl.program_id(0), pl.program_id(1), form.penalties.label_smoothing
    block = w.shape[0 if form.transposed else 1]

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        for ref in outputs[1:]:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    has_tail = vocab % block != 0
    if has_tail:
        pl.when(j == steps - 1)(functools.partial(_clear_tail, w, vocab % block, form))
    logits = known = form.to_logits(_products(x, w, form))
    entries = j * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if has_tail:
        logits = jnp.where(entries < vocab, logits, LOWEST)
    one_hot = entries == targets[...]
    highest = jnp.maximum(top[...], logits.max(axis=1, keepdims=True))
    exps = jnp.exp(logits - highest)
    shrink = jnp.exp(top[...] - highest)
    top[...] = highest
    total[...] = total[...] * shrink + exps.sum(axis=1, keepdims=True)
    at_target[...] += jnp.where(one_hot, logits, 0.0).sum(axis=1, keepdims=True)
    if smoothing:
        logit_sum[...] += known.sum(axis=1, keepdims=True)
    if not gradients:
        return
    expected, rows = gradients
    slope = form.slope(known)
    exps = (exps * slope).astype(w.dtype)

    def add_expected(part: Any) -> None:
        product = _dot(exps, _columns(w, part, form), not form.transposed)
        expected[:, part] = expected[:, part] * shrink + product

    _for_slices(w.shape[1 if form.transposed else 0], add_expected)

    @pl.when(bool(smoothing) | ((first[i] < (j + 1) * block) & (last[i] >= j * block)))
    def _() -> None:
        share = jnp.where(one_hot, 1 - smoothing, 0.0) + smoothing / form.vocab
        share = (share * slope).astype(w.dtype)

        def add_rows(part: Any) -> None:
            product = _dot(share, _columns(w, part, form), not form.transposed)
            rows[:, part] += product.astype(rows.dtype)

        _for_slices(w.shape[1 if form.transposed else 0], add_rows)


def _weight_gradient(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    lse: jax.Array,
    count: jax.Array,
    form: Form,
    *,
    dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """Gradient of sum(weights * losses), like w."""
    n, d = x.shape
    vocab = w.shape[0 if form.transposed else 1]
    itemsize = x.dtype.itemsize
    size, block = _block_sizes(d, vocab, 2 * itemsize, 4 + 2 * itemsize + 2 * dtype.itemsize)
    size = min(size, -(-n // 16) * 16)
    pad = -n % size
    # Without weight exp(logit - lse) must be a number too.
    lse = jnp.where(weights != 0, lse, -LOWEST)
    of_softmax = weights * (1 + 2 * form.penalties.z_loss * lse * (weights != 0))
    columns = [jnp.pad(c, (0, pad))[:, None] for c in (targets, lse, of_softmax, weights)]
    x = jnp.pad(x, ((0, pad), (0, 0)))
    last = jnp.maximum(pl.cdiv(count, size) - 1, 0)[None]
    steps, parts = pl.cdiv(vocab, block), (n + pad) // size

    def of_tokens(j: jax.Array, i: jax.Array, last: jax.Array) -> tuple:
        return jnp.minimum(i, last[0]), 0  # what is skipped is not fetched either

    column = pl.BlockSpec((size, 1), of_tokens)
    of_w = _weight_spec(block, d, form, lambda j, *_: j)
    return pl.pallas_call(
        functools.partial(_weight_gradient_kernel, form=form, parts=parts),
        out_shape=jax.ShapeDtypeStruct(w.shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, parts),
            in_specs=[
                *[column] * 4,
                pl.BlockSpec((size, d), of_tokens),
                of_w,
            ],
            out_specs=of_w,
            scratch_shapes=[pltpu.VMEM((block, d), jnp.float32)],
        ),
        compiler_params=_compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * d * vocab,
            transcendentals=n * vocab,
            bytes_accessed=(steps * x.size + w.size) * itemsize + w.size * dtype.itemsize,
        ),
        interpret=interpret,
        name="cross_entropy_weight_gradient",
    )(last, *columns, x, w)


def _weight_gradient_kernel(
    last: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    of_softmax: jax.Array,
    weights: jax.Array,
    x: jax.Array,
    w: jax.Array,
    dw: jax.Array,
    total: jax.Array,
    *,
    form: Form,
    parts: int,
) -> None:
    j, i = pl.program_id(0), pl.program_id(1)
    block, smoothing = total.shape[0], form.penalties.label_smoothing

    @pl.when(i == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(i <= last[0])
    def _() -> None:
        logits = form.to_logits(_products(x, w, form))
        entries = j * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        share = jnp.where(entries == targets[...], 1 - smoothing, 0.0) + smoothing / form.vocab
        dlogits = of_softmax[...] * jnp.exp(logits - lse[...]) - weights[...] * share
        dlogits = (dlogits * form.slope(logits)).astype(x.dtype)

        def add(part: Any) -> None:
            total[:, part] += jax.lax.dot_general(
                dlogits, x[:, part], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        _for_slices(total.shape[1], add)

    @pl.when(i == parts - 1)
    def _() -> None:
        dw[...] = (total[...] if form.transposed else total[...].T).astype(dw.dtype)


def _weight_spec(
    block: int, width: int, form: Form, entry: Callable[..., jax.Array]
) -> pl.BlockSpec:
    """Blocks of the vocabulary; `entry` gives the number of the block."""
    if form.transposed:
        return pl.BlockSpec((block, width), lambda *step: (entry(*step), 0))
    return pl.BlockSpec((width, block), lambda *step: (0, entry(*step)))


def _resident(size: int, width: int) -> pl.BlockSpec:
    """Rows of a core, which stay in VMEM while it goes over the vocabulary: one buffer will do."""
    mode = pl.Buffered(buffer_count=1)
    return pl.BlockSpec((size, width), lambda i, *_: (i, 0), pipeline_mode=mode)


def _clear_tail(w: jax.Array, rest: int, form: Form) -> None:
    """Zeros what a block of w has beyond its first `rest` entries, undefined in the last block."""
    if form.transposed:
        w[rest:, :] = jnp.zeros((w.shape[0] - rest, w.shape[1]), w.dtype)
    else:
        w[:, rest:] = jnp.zeros((w.shape[0], w.shape[1] - rest), w.dtype)


def _products(x: Any, w: Any, form: Form) -> jax.Array:
    """x times a block of w: float32 [tokens, entries]."""
    tokens, width = x.shape
    length = _slice(width)
    zeros = jnp.zeros((tokens, w.shape[0 if form.transposed else 1]), jnp.float32)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        part = pl.ds(pl.multiple_of(i * length, length), length)
        return total + _dot(x[:, part], _columns(w, part, form), form.transposed)

    return jax.lax.fori_loop(0, width // length, add, zeros)


def _for_slices(width: int, function: Callable[[Any], None]) -> None:
    length = _slice(width)

    def step(i: jax.Array, _: None) -> None:
        function(pl.ds(pl.multiple_of(i * length, length), length))

    jax.lax.fori_loop(0, width // length, step, None)


def _slice(width: int) -> int:
    """The largest part of D that lies on whole lanes; all of it where there is none."""
    return next((s for s in range(SLICE, 127, -128) if width % s == 0), width)


def _columns(w: Any, part: Any, form: Form) -> jax.Array:
    """A slice of D of a block of w."""
    return w[:, part] if form.transposed else w[part, :]


def _dot(left: jax.Array, right: jax.Array, transposed: bool) -> jax.Array:
    """left times right, or right turned; float32."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=int(0.95 * _vmem_and_cores()[0])
    )
