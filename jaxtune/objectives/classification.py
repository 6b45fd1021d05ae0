"""Labels of texts and of tokens: classes, sets of classes, scores.

A text is labelled at one token (an encoder's first, a decoder's last), so both tasks are the same
sum over labelled tokens. The losses are those of transformers' heads, by `problem_type`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.heads import label_logits

Sums = dict[str, jax.Array]


def classification(model: Any, batch: Any) -> tuple[jax.Array, Sums]:
    """Sum over labelled tokens of weight * loss, by the head's problem.

    Args:
        model: with a head for labels.
        batch: TokenBatch of [B, T] arrays; labels [C, B, T].

    Returns:
        The sum, and sums to report: `weight` (of all labelled tokens), and by problem `correct`
        (weight of the right ones), `by_label` or `moments` (see `measures`).
    """
    problem = PROBLEMS[model.classifier.config.problem]
    loss, sums = problem(label_logits(model, batch), batch.labels, batch.weights)
    return (loss * batch.weights).sum(), {"weight": batch.weights.sum(), **sums}


def _one_of_many(
    logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Sums]:
    """-log p(class), [B, T]."""
    wanted = labels[0].astype(jnp.int32)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
    guess = logits.argmax(axis=-1)
    numbers = logits.shape[-1]
    counts = _by_label(jax.nn.one_hot(guess, numbers), jax.nn.one_hot(wanted, numbers), weights)
    return loss, {"correct": (weights * (guess == wanted)).sum(), "by_label": counts}


def _some_of_many(
    logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Sums]:
    """Binary cross-entropy, the mean over classes [B, T]; right is a token all of whose are."""
    wanted = jnp.moveaxis(labels, 0, -1)
    loss = (jax.nn.softplus(logits) - wanted * logits).mean(axis=-1)
    guess = (logits > 0).astype(jnp.float32)
    right = (guess == wanted).all(axis=-1)
    return loss, {
        "correct": (weights * right).sum(),
        "by_label": _by_label(guess, wanted, weights),
    }


def _score(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Sums]:
    """Squared error, the mean over outputs [B, T]."""
    wanted = jnp.moveaxis(labels, 0, -1)
    products = [logits, wanted, logits**2, wanted**2, logits * wanted]
    moments = [(weights[..., None] * x).sum(axis=(0, 1)) for x in products]
    return ((logits - wanted) ** 2).mean(axis=-1), {"moments": jnp.stack(moments)}


def _by_label(guess: jax.Array, wanted: jax.Array, weights: jax.Array) -> jax.Array:
    """Of each class [3, K]: how often it was found where it is, named, and there."""
    counted = (weights > 0)[..., None]
    return jnp.stack([(counted * x).sum(axis=(0, 1)) for x in (guess * wanted, guess, wanted)])


PROBLEMS: Mapping[str, Callable[..., tuple[jax.Array, Sums]]] = MappingProxyType(
    {
        "single_label_classification": _one_of_many,
        "multi_label_classification": _some_of_many,
        "regression": _score,
    }
)
