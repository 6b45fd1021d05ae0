"""Sequence to sequence: cross-entropy of a target's tokens, given its source and those before."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune.objectives.sft import token_loss


def seq2seq(
    model: Any, batch: Any, *, loss_dtype: DTypeLike, cross_entropy: str = "chunked"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of targets of weight * -log p(token | source, tokens before it).

    The decoder reads the start token and then the target without its last token, as transformers'
    T5 does with labels.

    Args:
        model: an encoder-decoder.
        batch: PairBatch of [B, S] and [B, T] arrays.
        loss_dtype: dtype of the logits.
        cross_entropy: implementation of the loss, a name of `ops.cross_entropy.IMPLEMENTATIONS`.

    Returns:
        The sum, and sums to report: `weight` (of all tokens) and `correct` (weight of the tokens
        that have the largest logit).
    """
    memory = model.encoded(batch.source, batch.source_segments)
    read = jnp.roll(batch.tokens, 1, axis=1).at[:, 0].set(model.config.start_token)
    hidden = model.decoded(read, batch.segment_ids, memory, batch.source_segments)
    loss, correct = token_loss(
        model,
        hidden,
        batch.tokens,
        batch.weights,
        loss_dtype=loss_dtype,
        cross_entropy=cross_entropy,
    )
    return loss, {"weight": batch.weights.sum(), "correct": correct}
