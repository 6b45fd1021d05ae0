"""Output matrix and softmax cross-entropy in one, without the logits of all tokens.

`chunked` (XLA) and `pallas_tpu` never hold more logits than those of a few hundred tokens or of one
block of the vocabulary; `reference` is dense, the oracle of the tests. The gradient with respect to
x is made in the forward pass, where the logits are at hand: for each token it is a fixed row times
the cotangent of its loss, so the backward pass only multiplies.

Tokens of weight 0 are put last and cost nothing. On a mesh each device works on its own tokens and
its own part of the vocabulary (`shards.py`).
"""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxtune.ops.cross_entropy.form import NO_PENALTIES, PLAIN, Form, Logits, Penalties
from jaxtune.ops.cross_entropy.shards import run

__all__ = ["IMPLEMENTATIONS", "Logits", "Penalties", "cross_entropy", "token_logprobs"]

# Modules with a function `run`; kernels take long to import and are, therefore, when they are used.
IMPLEMENTATIONS = MappingProxyType(
    {name: f"{__name__}.{name}" for name in ("chunked", "pallas_tpu", "reference")}
)

Shardings = tuple[NamedSharding, NamedSharding]


def cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    transposed: bool,
    loss_dtype: DTypeLike = jnp.float32,
    logits: Logits = PLAIN,
    penalties: Penalties = NO_PENALTIES,
    shardings: Shardings | None = None,
    implementation: str = "chunked",
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(x w)[target] (and penalties), and of correct predictions.

    Args:
        x: [B, T, D] hidden states.
        w: [D, V], or [V, D] if `transposed` (a tied embedding).
        targets: int32 [B, T].
        weights: float32 [B, T]; tokens of weight 0 cost nothing, whatever their target.
        transposed: the layout of `w`.
        loss_dtype: dtype the logits are rounded to.
        logits: scale and soft cap of the logits.
        penalties: z-loss and label smoothing.
        shardings: how x and w lie on a mesh of several devices; None: on one, or as XLA sees fit.
        implementation: a name of `IMPLEMENTATIONS`; a named one never falls back.

    Returns:
        Two float32 scalars: sum of weight * loss, and sum of weight over tokens whose target has
        the largest logit (ties count as correct).

    Raises:
        NotImplementedError: the implementation lacks what is asked for.
    """
    form = _form(w, transposed, loss_dtype, logits, penalties)
    return _cross_entropy(x, w, targets, weights, form, IMPLEMENTATIONS[implementation], shardings)


def token_logprobs(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    transposed: bool,
    loss_dtype: DTypeLike = jnp.float32,
    logits: Logits = PLAIN,
    shardings: Shardings | None = None,
    implementation: str = "chunked",
) -> jax.Array:
    """log softmax(x w)[target] of each token, differentiable in x and w.

    Args:
        x: [B, T, D] hidden states.
        w: [D, V], or [V, D] if `transposed`; its gradient takes a second pass over the logits.
        targets: int32 [B, T].
        mask: bool [B, T], tokens that are wanted; the others cost nothing and are 0. None: all.
        transposed, loss_dtype, logits, shardings, implementation: see `cross_entropy`.

    Returns:
        float32 [B, T].
    """
    form = _form(w, transposed, loss_dtype, logits, NO_PENALTIES)
    weights = jnp.ones(targets.shape) if mask is None else mask.astype(jnp.float32)
    return _token_logprobs(x, w, targets, weights, form, IMPLEMENTATIONS[implementation], shardings)


def _form(
    w: jax.Array, transposed: bool, dtype: DTypeLike, logits: Logits, penalties: Penalties
) -> Form:
    vocab = w.shape[0 if transposed else 1]
    return Form(transposed, jnp.dtype(dtype), logits, penalties, vocab)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    form: Form,
    module: str,
    shardings: Shardings | None,
) -> tuple[jax.Array, jax.Array]:
    loss, correct, _, _ = run(module, x, w, targets, weights, form, shardings)
    return (loss * weights).sum(), (correct * weights).sum()


def _cross_entropy_forward(
    x: CustomVJPPrimal,
    w: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    form: Form,
    module: str,
    shardings: Shardings | None,
) -> tuple:
    if weights.perturbed:
        raise NotImplementedError("weights have no gradient: those of weight 0 are not computed")
    values = (x.value, w.value, targets.value, weights.value)
    wanted = {"of_x": x.perturbed, "of_w": w.perturbed}
    loss, correct, dx, dw = run(module, *values, form, shardings, **wanted)
    sums = ((loss * weights.value).sum(), (correct * weights.value).sum())
    return sums, (dx, dw)


def _cross_entropy_backward(
    form: Form, module: str, shardings: Shardings | None, saved: tuple, cotangents: tuple
) -> tuple:
    g = cotangents[0]  # the count of correct predictions has no gradient
    if isinstance(g, SymbolicZero):
        g = jnp.float32(0)
    scaled = (None if d is None else (d * g).astype(d.dtype) for d in saved)
    return (*scaled, None, None)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_logprobs(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    form: Form,
    module: str,
    shardings: Shardings | None,
) -> jax.Array:
    losses = run(module, x, w, targets, weights, form, shardings)[0]
    return jnp.where(weights != 0, -losses, 0.0)


def _token_logprobs_forward(
    x: CustomVJPPrimal,
    w: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    form: Form,
    module: str,
    shardings: Shardings | None,
) -> tuple:
    values = (x.value, w.value, targets.value, weights.value)
    losses, _, dx, _ = run(module, *values, form, shardings, of_x=x.perturbed)
    return jnp.where(weights.value != 0, -losses, 0.0), (dx, values if w.perturbed else None)


def _token_logprobs_backward(
    form: Form, module: str, shardings: Shardings | None, saved: tuple, g: jax.Array
) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    dx, values = saved
    dw = None
    if values is not None:
        x, w, targets, weights = values
        # The gradient of the sum of g * log p is that of a cross-entropy with weights -g.
        weights = jnp.where(weights != 0, -g, 0.0)
        dw = run(module, x, w, targets, weights, form, shardings, of_w=True)[3]
    return None if dx is None else (dx * -g[..., None]).astype(dx.dtype), dw, None, None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward, symbolic_zeros=True)
