"""Experts balanced by what is added to their scores, without a loss."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import optax


def balance(
    tx: optax.GradientTransformation, loads: Collection[str], rate: float
) -> optax.GradientTransformationExtraArgs:
    """`tx` for all parameters but some, which take a step of `rate` towards even loads.

    b_e <- b_e + rate sign(mean load - load of e) (Wang et al. 2024, arXiv 2408.15664, algorithm 1;
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2). No schedule, clipping or decay applies to it.

    Args:
        tx: the optimizer.
        loads: parameters [..., E] whose gradients are the loads of E experts (`nn.moe`).
        rate: gamma in V3's paper, u in the first.
    """
    update_rest = optax.with_extra_args_support(tx).update

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        own = {name: updates[name] for name in updates if name in loads}
        zeros = {name: jnp.zeros_like(load) for name, load in own.items()}
        steps: Any
        steps, state = update_rest(updates | zeros, state, params, **extra)
        return steps | {name: rate * _towards_even(load) for name, load in own.items()}, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _towards_even(load: Any) -> Any:
    """sign(mean - load) of whole numbers, exact where they are equal."""
    return jnp.sign(load.sum(axis=-1, keepdims=True) - load * load.shape[-1])
