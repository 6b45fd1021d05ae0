"""XLA: the tokens go through in chunks, so the logits of only one chunk exist at a time.

While they exist the gradients are made from them too, so that nothing is kept or computed twice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.hlo import notes
from jaxtune.ops.cross_entropy.form import Form, Parts

CHUNK_LOGITS = 1 << 24  # 64 MiB in float32: so many anyway,
CHUNK_SHARE = 32  # or this part of all: the matrix's reading must not outlast the products
CHUNK_TOKENS = 512


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
) -> Parts:
    """Losses of the tokens of a shard, and the gradients of their weighted sum.

    Args:
        x: [N, D].
        w: [D, V] or [V, D], this shard's part of the vocabulary, in x's dtype.
        targets: int32 [N], index into this part; negative where the target is elsewhere.
        weights: float32 [N].
        count: only the first `count` tokens are wanted; the others have weight 0.
        form: what the loss is.
        of_x: dx is wanted.
        dw_dtype: dtype of dw; None: it is not wanted.
    """
    size = _chunk_size(x.shape[0], w.shape[0 if form.transposed else 1])

    def chunk(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        losses, correct, dx, dw = _chunk(
            x, targets, weights, w, form, of_x=of_x, of_w=dw_dtype is not None
        )
        return (losses, correct, dx), dw

    (losses, correct, dx), dw = by_chunks(chunk, size, (x, targets, weights), count)
    if dw is not None:
        dw = (dw.T if form.transposed else dw).astype(dw_dtype)
    return Parts(losses, correct, dx, dw)


def _chunk_size(tokens: int, vocab: int) -> int:
    """Tokens of a chunk: of the sizes near the largest allowed, one that leaves little padding."""
    most = min(CHUNK_TOKENS, max(64, CHUNK_LOGITS // vocab, tokens // CHUNK_SHARE)) // 64
    return 64 * min(range(most, most // 2, -1), key=lambda size: -tokens % (64 * size))


def by_chunks(
    function: Callable[..., tuple[Any, Any]],
    size: int,
    arrays: tuple[jax.Array, ...],
    count: jax.Array,
) -> tuple[Any, Any]:
    """Calls `function` with `size` rows of `arrays` [N, ...] at a time, up to row `count`.

    Args:
        function: returns rows (a tree of [size, ...]) and sums (a tree), which are added up.
        size: rows in a chunk; less if there are fewer.
        arrays: what is cut into chunks.
        count: rows from here on are left out; in the result they are zero.

    Returns:
        All rows [N, ...], and the sums over the chunks.
    """
    n = arrays[0].shape[0]
    size = min(size, n)
    arrays = jax.tree.map(
        lambda a: jnp.pad(a, ((0, -n % size),) + ((0, 0),) * (a.ndim - 1)), arrays
    )

    def part(i: jax.Array | int) -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size), arrays)

    def step(i: jax.Array, carry: tuple) -> tuple:
        rows, sums = function(*part(i))
        put = jax.lax.dynamic_update_slice_in_dim
        rows = jax.tree.map(lambda whole, r: put(whole, r, i * size, 0), carry[0], rows)
        return rows, jax.tree.map(jnp.add, carry[1], sums)

    rows, sums = jax.eval_shape(function, *part(0))
    padded = n + -n % size
    rows = jax.tree.map(lambda r: jnp.zeros((padded, *r.shape[1:]), r.dtype), rows)
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    with notes.at_most(padded // size):
        rows, sums = jax.lax.fori_loop(0, (count + size - 1) // size, step, (rows, sums))
    return jax.tree.map(lambda r: r[:n], rows), sums


def _chunk(
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    w: jax.Array,
    form: Form,
    *,
    of_x: bool,
    of_w: bool,
) -> tuple:
    """One chunk [C, D]: losses, correct, dx, and dw as [D, V] (None where not asked for)."""

    def dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    vd = "vd" if form.transposed else "dv"
    smoothing, z_loss = form.penalties.label_smoothing, form.penalties.z_loss
    logits = form.to_logits(dot(f"td,{vd}->tv", x, w))
    index = jnp.maximum(targets, 0)[:, None]
    at_target = jnp.where(targets < 0, 0.0, jnp.take_along_axis(logits, index, axis=-1)[:, 0])
    top = logits.max(axis=-1)
    exps = jnp.exp(logits - top[:, None]).astype(x.dtype)
    total = exps.astype(jnp.float32).sum(axis=-1)
    logit_sum = logits.sum(axis=-1) if smoothing else jnp.zeros_like(top)
    sums, share = form.combine(top, total, at_target, logit_sum)
    losses, correct = form.losses(sums), sums.at_target >= sums.top
    # d loss / d logits = of_exps * exps - of_target * one_hot - even
    of_exps = (weights * (1 + 2 * z_loss * sums.lse) * share / total)[:, None]
    of_target = (weights * (1 - smoothing))[:, None]
    if not of_x and not of_w:
        return losses, correct, None, None
    one_hot = jnp.arange(logits.shape[-1]) == targets[:, None]
    dlogits = exps.astype(jnp.float32) * of_exps - jnp.where(one_hot, of_target, 0.0)
    if smoothing:
        dlogits -= (weights * (smoothing / form.vocab))[:, None]
    dlogits = (dlogits * form.slope(logits)).astype(x.dtype)
    dx = dot(f"tv,{vd}->td", dlogits, w).astype(x.dtype) if of_x else None
    # XLA for CPU has no fast product that contracts the leading axis of its left operand: the
    # small one is turned first, which the barrier keeps apart.
    dw = dot("dt,tv->dv", jax.lax.optimization_barrier(x.T), dlogits) if of_w else None
    return losses, correct, dx, dw
