"""Output matrix and softmax cross-entropy in one, without the logits of all tokens.

The tokens go through in chunks. While a chunk's logits exist, the forward pass makes the loss *and*
its gradients from them, so they are neither kept nor computed twice; the backward pass multiplies
the gradients by the loss's cotangent, a scalar.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike


def cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    transposed: bool,
    loss_dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(x w)[target], and of correct predictions.

    Args:
        x: [B, T, D] hidden states.
        w: [D, V], or [V, D] if `transposed` (a tied embedding).
        targets: int32 [B, T].
        weights: float32 [B, T]; tokens of weight 0 cost nothing where a whole chunk has none.
        transposed: the layout of `w`.
        loss_dtype: dtype of the logits.

    Returns:
        Two float32 scalars: sum of weight * loss, and sum of weight over tokens whose target has
        the largest logit (ties count as correct).
    """
    return _cross_entropy(x, w, targets, weights, transposed, jnp.dtype(loss_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    transposed: bool,
    loss_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    loss, correct, _, _ = _scan_chunks(
        x, w, targets, weights, transposed, loss_dtype, of_x=False, of_w=False
    )
    return loss, correct


def _forward(
    x: CustomVJPPrimal,
    w: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    transposed: bool,
    loss_dtype: jnp.dtype,
) -> tuple:
    values = (x.value, w.value, targets.value, weights.value)
    loss, correct, dx, dw = _scan_chunks(
        *values, transposed, loss_dtype, of_x=x.perturbed, of_w=w.perturbed
    )
    return (loss, correct), (dx, dw)


def _backward(transposed: bool, loss_dtype: jnp.dtype, saved: tuple, cotangents: tuple) -> tuple:
    g = cotangents[0]  # the count of correct predictions has no gradient
    dx, dw = saved
    if isinstance(g, SymbolicZero):
        g = jnp.float32(0)
    scaled = (None if d is None else (d * g.astype(d.dtype)) for d in (dx, dw))
    return (*scaled, None, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan_chunks(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    transposed: bool,
    loss_dtype: jnp.dtype,
    *,
    of_x: bool,
    of_w: bool,
) -> tuple:
    """Loss, correct count, and the gradients asked for (None otherwise)."""
    b, t, d = x.shape
    length = _chunk_length(b, t, w.shape[0] if transposed else w.shape[1])
    pad = -t % length

    def chunked(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, length, ...]
        array = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return array.reshape(b, -1, length, *array.shape[2:]).swapaxes(0, 1)

    w_computed = w.astype(x.dtype)
    chunk = functools.partial(
        _chunk, w=w_computed, transposed=transposed, loss_dtype=loss_dtype, of_x=of_x, of_w=of_w
    )

    def body(dw: jax.Array | None, xs: tuple) -> tuple:
        skip = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(chunk, *xs))
        loss, correct, dx, dw_part = jax.lax.cond(jnp.any(xs[2] != 0), chunk, lambda *_: skip, *xs)
        return (None if dw is None else dw + dw_part), (loss, correct, dx)

    dw = jnp.zeros(w.shape, jnp.float32) if of_w else None
    dw, (loss, correct, dx) = jax.lax.scan(
        body, dw, (chunked(x), chunked(targets), chunked(weights))
    )
    if dx is not None:
        dx = dx.swapaxes(0, 1).reshape(b, -1, d)[:, :t]
    return loss.sum(), correct.sum(), dx, None if dw is None else dw.astype(w.dtype)


def _chunk_length(b: int, t: int, vocab: int) -> int:
    """Tokens of each row in a chunk: at most 512 tokens and 32M logits in all."""
    tokens = max(1, min(512, (1 << 25) // vocab))
    return min(t, max(1, tokens // b))


def _chunk(
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    w: jax.Array,
    transposed: bool,
    loss_dtype: jnp.dtype,
    of_x: bool,
    of_w: bool,
) -> tuple:
    """One chunk [B, C, D]: loss, correct count, dx, dw (None where not asked for)."""

    def dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    vd = "vd" if transposed else "dv"
    logits = dot(f"btd,{vd}->btv", x, w).astype(loss_dtype).astype(jnp.float32)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    top = logits.max(axis=-1, keepdims=True)
    exps = jnp.exp(logits - top).astype(x.dtype)
    total = exps.astype(jnp.float32).sum(axis=-1, keepdims=True)
    weights = weights[..., None]
    loss = ((jnp.log(total) + top - at_target) * weights).sum()
    correct = (weights * (at_target >= top)).sum()
    dx = dw = None
    # d loss / d logits = (softmax - one_hot) * weight; the one_hot part is a row of w.
    if of_x:
        rows = w[targets] if transposed else jnp.moveaxis(w[:, targets], 0, -1)
        dx = dot(f"btv,{vd}->btd", exps, w) * (weights / total) - weights * rows
        dx = dx.astype(x.dtype)
    if of_w:
        softmax = exps.astype(jnp.float32) * (weights / total)
        one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
        dlogits = (softmax - jnp.where(one_hot, weights, 0.0)).astype(x.dtype)
        dw = dot(f"btv,btd->{vd}", dlogits, x)
    return loss, correct, dx, dw
