"""Supervised fine-tuning: next-token cross-entropy on the trained tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune import ops


def sft(model: Any, batch: Any, *, loss_dtype: DTypeLike) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over target tokens of weight * -log p(token | tokens before it).

    Args:
        model: a decoder.
        batch: TokenBatch of [B, T] arrays.
        loss_dtype: dtype of the logits.

    Returns:
        The sum, and sums to report: `weight` (of all targets) and `correct` (weight of the targets
        that have the largest logit).
    """
    hidden, _ = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    # Output t predicts token t + 1; the last column has no target.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    weights = jnp.roll(batch.weights, -1, axis=1).at[:, -1].set(0.0)
    weight, transposed = model.head()
    loss, correct = ops.cross_entropy(
        hidden, weight, targets, weights, transposed=transposed, loss_dtype=loss_dtype
    )
    return loss, {"weight": weights.sum(), "correct": correct}
