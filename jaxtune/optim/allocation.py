"""A budget of ranks that goes where it matters: AdaLoRA's allocation, around any optimizer.

Adapters are triplets of a column of A, a number of E and a row of B. After a step with gradients g,

    I = |p g|,  I' = b1 I' + (1 - b1) I,  U' = b2 U' + (1 - b2) |I - I'|,  score of p = I' U'

the score of a triplet is that of its e plus the means of those of its column and its row. Of all
layers' triplets together those with the lowest scores get e = 0, so many that the budget is met: it
falls along a cubic from all to the final one. At the end of the fall the choice becomes final.

Zhang et al. 2023, arXiv 2303.10512, equations 8 to 12, and PEFT 0.21.2 (`RankAllocator`), whose
step t is here the number of steps taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.tree import Params


@dataclass(frozen=True)
class Allocation:
    """How many triplets stay, and when that is decided.

    Attributes:
        triplets: name of every E -> bool like it, which of its entries are triplets.
        budget: int32 [t], how many have e != 0 after step t, if that is decided then.
        decides: bool [t], whether it is; the last one is final.
        b1, b2: decay of the means of I and U.
    """

    triplets: Mapping[str, np.ndarray]
    budget: np.ndarray
    decides: np.ndarray
    b1: float
    b2: float


class AllocationState(NamedTuple):
    """What is kept of each step.

    Attributes:
        count: int32, applied steps.
        sensitivity, uncertainty: I' and U' of A, E and B, by name.
        kept: bool by name of E: the newest decision.
        inner: the optimizer's.
    """

    count: jax.Array
    sensitivity: Params
    uncertainty: Params
    kept: Params
    inner: Any


def cubic(
    first: int, last: int, *, begin: int, end: int, every: int
) -> tuple[np.ndarray, np.ndarray]:
    """The budget after each step 0, 1, ..., `end`, and whether it is applied.

    Args:
        first, last: triplets at first and in the end.
        begin: steps before it falls.
        end: the step at which it is final.
        every: steps between decisions.
    """
    steps = np.arange(end + 1)
    rest = 1 - (steps - begin) / (end - begin)
    falling = ((first - last) * rest**3 + last).astype(np.int32)  # rounded down
    decides = (steps > begin) & (steps % every == 0) | (steps == end)
    return np.where(steps <= begin, first, falling).astype(np.int32), decides


def allocate(tx: optax.GradientTransformation, plan: Allocation) -> optax.GradientTransformation:
    """`tx`, after whose updates the least important triplets are zero."""
    end = len(plan.budget) - 1

    def init(params: Params) -> AllocationState:
        zeros = {n: jnp.zeros_like(params[n]) for e in plan.triplets for n in _triple(e)}
        kept = {e: jnp.ones(params[e].shape, bool) for e in plan.triplets}
        copies = jax.tree.map(jnp.zeros_like, zeros)
        return AllocationState(jnp.zeros((), jnp.int32), zeros, copies, kept, tx.init(params))

    def update(grads: Params, state: AllocationState, params: Params) -> tuple[Params, Any]:
        updates: Any
        updates, inner = tx.update(grads, state.inner, params)
        count = state.count + 1
        sensitivity, uncertainty = dict(state.sensitivity), dict(state.uncertainty)
        for name in sensitivity:
            importance = jnp.abs((params[name] + updates[name]) * grads[name])
            mean = plan.b1 * sensitivity[name] + (1 - plan.b1) * importance
            far = jnp.abs(importance - mean)
            spread = plan.b2 * uncertainty[name] + (1 - plan.b2) * far
            learns = count < end
            sensitivity[name] = jnp.where(learns, mean, sensitivity[name])
            uncertainty[name] = jnp.where(learns, spread, uncertainty[name])
        step = jnp.minimum(count, end)
        decides = jnp.asarray(plan.decides)[step] & (count <= end)
        kept = jax.lax.cond(
            decides,
            lambda: _most_important(plan, sensitivity, uncertainty, jnp.asarray(plan.budget)[step]),
            lambda: state.kept,
        )
        changed: Params = dict(updates)
        for name, keep in kept.items():
            zeroed = (decides | (count > end)) & ~keep
            changed[name] = jnp.where(zeroed, -params[name], updates[name])
        return changed, AllocationState(count, sensitivity, uncertainty, kept, inner)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _triple(e: str) -> tuple[str, str, str]:
    """Names of the A, E and B of a layer, by that of its E."""
    slot = e.removesuffix("e")
    return f"{slot}a", e, f"{slot}b"


def _most_important(
    plan: Allocation, sensitivity: Params, uncertainty: Params, budget: jax.Array
) -> Params:
    """Which triplets stay, by name of E."""
    scores = {}
    for name, real in plan.triplets.items():
        a, e, b = (sensitivity[n] * uncertainty[n] for n in _triple(name))
        scores[name] = jnp.where(real, e + a.mean(axis=-2) + b.mean(axis=-1), jnp.inf)
    ascending = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    count = sum(int(real.sum()) for real in plan.triplets.values())
    cut = jnp.where(budget < count, ascending[jnp.maximum(count - budget - 1, 0)], -1.0)
    return {name: score > cut for name, score in scores.items()}
