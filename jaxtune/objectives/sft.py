"""Supervised fine-tuning: next-token cross-entropy on the trained tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxtune import ops
from jaxtune.nn.params import Policy
from jaxtune.sharding import rules


def sft(
    model: Any,
    batch: Any,
    *,
    loss_dtype: DTypeLike,
    cross_entropy: str = "chunked",
    imbalance: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over target tokens of weight * -log p(token | tokens before it).

    Args:
        model: a decoder.
        batch: TokenBatch of [B, T] arrays.
        loss_dtype: dtype of the logits.
        cross_entropy: implementation of the loss, a name of `ops.cross_entropy.IMPLEMENTATIONS`.
        imbalance: factor of the imbalance of experts, which each target token has of its example.

    Returns:
        The sum, and sums to report: `weight` (of all targets) and `correct` (weight of the targets
        that have the largest logit).
    """
    given = (batch.tokens, batch.positions, batch.segment_ids)
    prompts = None if model.edit is None else _prompts(batch)
    forward = model.hidden_and_imbalance if imbalance else model.hidden
    hidden, uneven = forward(*given, prompts=prompts)
    # Output t predicts token t + 1; the last column has no target.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    weights = jnp.roll(batch.weights, -1, axis=1).at[:, -1].set(0.0)
    loss, correct = token_loss(
        model, hidden, targets, weights, loss_dtype=loss_dtype, cross_entropy=cross_entropy
    )
    if imbalance:
        loss += imbalance * (weights * uneven).sum()
    return loss, {"weight": weights.sum(), "correct": correct}


def token_loss(
    model: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    loss_dtype: DTypeLike,
    cross_entropy: str,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weight * -log p(target), and weight of the targets that have the largest logit.

    Args:
        model: whose head multiplies with the hidden states.
        hidden: [B, T, D].
        targets: int32 [B, T], what the output at each place should be.
        weights: float32 [B, T].
        loss_dtype, cross_entropy: as of `sft`.
    """
    weight, transposed = model.head()
    return ops.cross_entropy(
        hidden,
        weight,
        targets,
        weights,
        transposed=transposed,
        loss_dtype=loss_dtype,
        logits=model.config.logits,
        shardings=_shardings(hidden, weight, transposed, model.policy),
        implementation=cross_entropy,
    )


def _prompts(batch: Any) -> jax.Array:
    """Tokens of each token's example before the first that is trained: int32 [B, T]."""
    length = batch.tokens.shape[1]
    first = jnp.where(batch.weights > 0, batch.positions, length)

    def of_row(ids: jax.Array, first: jax.Array) -> jax.Array:
        return jax.ops.segment_min(first, ids, num_segments=length + 1)[ids]

    return jax.vmap(of_row)(batch.segment_ids, first)


def _shardings(
    hidden: jax.Array, weight: jax.Array, transposed: bool, policy: Policy
) -> tuple[NamedSharding, NamedSharding] | None:
    """How hidden states and the head lie on a mesh of several devices."""
    mesh = policy.mesh
    if mesh is None or mesh.size == 1:
        return None
    axes = ("vocab", "embed") if transposed else ("embed", "vocab")
    rows = rules.sharding(hidden.shape, rules.OUTER_TOKENS, mesh)
    place = rules.specs if policy.sharding_stage == 3 else rules.gathered_specs
    return rows, NamedSharding(mesh, place(weight, axes, mesh))
