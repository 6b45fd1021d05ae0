"""One step of an optimizer, which a step that is not finite does not take.

`apply_whole` does everything at once and leaves the order to the compiler: right for elementwise
updates, which it fuses. `apply_by_layer` goes parameter by parameter and layer by layer, so that
the intermediate values of one matrix are held at a time, and its state where it is kept in host
memory: brought to the device at once, it would take more memory there than if it had stayed.

What an optimizer keeps of parameters is in dictionaries by the parameters' names; the rest of its
state (counts) is of all parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.tree import Params

# (tx, gradients, parameters, optimizer state, good, global norm) -> parameters, optimizer state
Apply = Callable[..., tuple[Params, Any]]


def apply_whole(
    tx: optax.GradientTransformation,
    grads: Params,
    params: Params,
    opt_state: Any,
    good: jax.Array,
    grad_norm: jax.Array,
) -> tuple[Params, Any]:
    """New parameters and optimizer state; bit for bit the old ones unless `good`.

    Args:
        tx: the optimizer.
        grads, params: by name.
        opt_state: of `tx`.
        good: bool, whether loss and gradients are finite.
        grad_norm: the global norm of all gradients.
    """
    update = optax.with_extra_args_support(tx).update
    updates, new_state = update(grads, opt_state, params, grad_norm=grad_norm)
    new = (optax.apply_updates(params, updates), new_state)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (params, opt_state))


def apply_by_layer(
    tx: optax.GradientTransformation,
    grads: Params,
    params: Params,
    opt_state: Any,
    good: jax.Array,
    grad_norm: jax.Array,
    *,
    axes: Mapping[str, tuple[str | None, ...]],
    host: bool,
    stages: int = 1,
) -> tuple[Params, Any]:
    """`apply_whole`, one layer's matrix after the other.

    Args:
        axes: names of the trailing axes of each parameter.
        host: whether what the optimizer keeps of matrices is in host memory.
        stages: shards of the axis of layers, each of which has its own layer's turn.
    """
    lead = (stages,) if stages > 1 else ()

    def apply(grads: Params, params: Params, state: Any) -> tuple[Params, Any]:
        moved = host and any(len(axes[name]) >= 2 for name in params)
        if moved:
            state = _over(lambda d: jax.device_put(d, jax.memory.Space.Device), state)
        params, state = apply_whole(tx, grads, params, state, good, grad_norm)
        if moved:
            state = _over(lambda d: jax.device_put(d, jax.memory.Space.Host), state)
        return params, state

    def layer(i: jax.Array, carry: tuple[Params, Params, Any]) -> tuple[Params, Params, Any]:
        grads, params, state = carry

        def at(stacked: Params) -> Params:
            return jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(
                    x.reshape(*lead, -1, *x.shape[1:]), i, len(lead), keepdims=False
                ),
                stacked,
            )

        def put(stacked: Params, one: Params) -> Params:
            return jax.tree.map(
                lambda x, y: jax.lax.dynamic_update_index_in_dim(
                    x.reshape(*lead, -1, *x.shape[1:]), y, i, len(lead)
                ).reshape(x.shape),
                stacked,
                one,
            )

        new_params, new_state = apply(at(grads), at(params), _over(at, state))
        return grads, put(params, new_params), _over(put, state, new_state)

    _, counts = apply({}, {}, _of(opt_state, None))
    done: Params = {}
    states, turn = [counts], good
    for name, param in params.items():
        given = ({name: grads[name]}, {name: param}, _of(opt_state, name))
        # Not before the last one is done: all at once they would all be on the device.
        given, _ = jax.lax.optimization_barrier((given, turn))
        if len(axes[name]) >= 2 and param.ndim > len(axes[name]) and param.shape[0] > 1:
            _, new, state = jax.lax.fori_loop(0, param.shape[0] // stages, layer, given)
        else:
            new, state = apply(*given)
        turn = new[name][(0,) * param.ndim]
        done |= new
        states.append(state)
    return done, _over(lambda *parts: {n: x for part in parts for n, x in part.items()}, *states)


def _of(state: Any, name: str | None) -> Any:
    """What is kept of one parameter, and the counts; of none, the counts."""
    return _over(lambda kept: {n: x for n, x in kept.items() if n == name}, state)


def _over(change: Callable[..., Params], *states: Any) -> Any:
    """Changes the dictionaries by parameter name; all else is the first state's."""
    return jax.tree.map(
        lambda node, *others: change(node, *others) if _is_by_name(node) else node,
        *states,
        is_leaf=_is_by_name,
    )


def _is_by_name(node: Any) -> bool:
    return isinstance(node, dict) and all("." in key for key in node)
