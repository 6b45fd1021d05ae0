"""An optimizer that begins anew for some parameters, which are other layers' from then on."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.tree import Params


class RestartState(NamedTuple):
    """Two states of one optimizer.

    Attributes:
        count: int32, applied steps.
        restarted: of parameters for which it begins anew.
        lasting: of the others.
    """

    count: jax.Array
    restarted: Any
    lasting: Any


def restart(
    tx: optax.GradientTransformation, names: Collection[str], every: int
) -> optax.GradientTransformation:
    """`tx`, with the state of the parameters `names` as at first after every so many steps."""

    def split(params: Params) -> tuple[Params, Params]:
        return (
            {name: leaf for name, leaf in params.items() if name in names},
            {name: leaf for name, leaf in params.items() if name not in names},
        )

    def init(params: Params) -> RestartState:
        restarted, lasting = split(params)
        return RestartState(jnp.zeros((), jnp.int32), tx.init(restarted), tx.init(lasting))

    def update(grads: Params, state: RestartState, params: Params) -> tuple[Params, RestartState]:
        (changing, lasting), (theirs, others) = split(grads), split(params)
        kept: Any = jax.lax.cond(
            state.count % every == 0, lambda: tx.init(theirs), lambda: state.restarted
        )
        first: Any
        rest: Any
        first, kept = tx.update(changing, kept, theirs)
        rest, other = tx.update(lasting, state.lasting, others)
        return {**first, **rest}, RestartState(state.count + 1, kept, other)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
