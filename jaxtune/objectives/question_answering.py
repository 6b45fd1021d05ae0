"""Extractive question answering: where in its context an answer starts and ends.

Two softmaxes over the tokens of an example, one for each border (Devlin et al. 2018, arXiv
1810.04805, 4.2). As in transformers the loss of an example is the mean of both; other than there,
padding takes no part in them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.heads import label_logits


def question_answering(model: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over examples of -(log p(start) + log p(end)) / 2.

    Args:
        model: with a head that scores every token as start and as end.
        batch: TokenBatch of [B, T] arrays; labels [2, B, T] mark each example's start and end.

    Returns:
        The sum, and sums to report: `weight` (examples) and `correct` (of which both borders have
        the largest score).
    """
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    scores, marks = jnp.moveaxis(label_logits(model, batch), -1, 0), batch.labels
    seen = jnp.where(same, scores[:, :, None, :], -jnp.inf)
    loss = (marks * (jax.nn.logsumexp(seen, axis=-1) - scores)).sum() / 2
    # Errors are counted where the example starts to be answered, which is once in it.
    wrong = (marks * (scores < seen.max(axis=-1))).sum(axis=0)
    errors = jnp.where(same, wrong[:, None, :], 0).sum(axis=-1)
    correct = (marks[0] * (errors == 0)).sum()
    return loss, {"weight": marks[0].sum(), "correct": correct}
