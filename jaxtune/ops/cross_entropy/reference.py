"""The oracle: all logits at once, float32, gradients by autodiff."""

import jax
import jax.numpy as jnp

from jaxtune.ops.cross_entropy.form import Form, Parts, Sums


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
    """See `chunked.run`; every token is computed, whatever `count` says."""
    if form.axes:
        raise NotImplementedError("reference: a sharded vocabulary needs all logits in one place")
    if form.dtype != jnp.float32:
        raise NotImplementedError(f"reference: logits are float32, not {form.dtype}")
    del count

    def weighted(x: jax.Array, w: jax.Array) -> tuple:
        losses, correct = _losses(x, w.T if form.transposed else w, targets, form)
        return (losses * weights).sum(), (losses, correct)

    operands = (x.astype(jnp.float32), w.astype(jnp.float32))
    (dx, dw), (losses, correct) = jax.grad(weighted, (0, 1), has_aux=True)(*operands)
    dw = None if dw_dtype is None else dw.astype(dw_dtype)
    return Parts(losses, correct, dx.astype(x.dtype) if of_x else None, dw)


def _losses(x: jax.Array, w: jax.Array, targets: jax.Array, form: Form) -> tuple:
    logits = form.to_logits(jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST))
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    top = logits.max(axis=-1)
    sums = Sums(jax.nn.logsumexp(logits, axis=-1), top, at_target, logits.sum(axis=-1))
    return form.losses(sums), at_target >= top
