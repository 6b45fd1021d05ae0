"""Layers of a stack of which some learn: only their weights' gradients are computed and kept.

Autodiff of a scan would make the gradient of every layer's weights. Here the backward pass is
written out: it goes down the stack, computes each layer again from its input, and asks for the
gradient of the weights of those that learn, of the input alone for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A parameter of a stack of layers, of which some learn.

    Attributes:
        stack: [n, ...], what the layers compute with.
        learning: [K, ...], takes the gradients of the layers `where`; its values are not used.
        where: int32 [K], ascending.
        through: whether what is below the first of them learns too.
    """

    stack: jax.Array
    learning: jax.Array
    where: jax.Array
    through: bool = field(metadata={"static": True})


def is_rows(value: Any) -> bool:
    """For `is_leaf`."""
    return isinstance(value, Rows)


def scan_some(
    layer: Callable[[jax.Array, Any, Any], jax.Array], x: jax.Array, params: Any, rows: Any
) -> jax.Array:
    """x through all layers, with gradients of those that learn.

    Args:
        layer: (x, one layer's parameters, rows) -> x.
        x: [B, T, D].
        params: a tree of `Rows`.
        rows: what goes with the rows of x; it gets no gradient.
    """
    stack, learning = (
        jax.tree.map(lambda leaf, part=part: getattr(leaf, part), params, is_leaf=is_rows)
        for part in ("stack", "learning")
    )
    first = jax.tree.leaves(params, is_leaf=is_rows)[0]
    num_layers, through = first.stack.shape[0], first.through

    @jax.custom_vjp
    def run(x: Any, rows: Any, stack: Any, learning: Any, where: Any) -> Any:
        return jax.lax.scan(lambda x, params: (layer(x, params, rows), None), x, stack)[0]

    def forward(x: Any, rows: Any, stack: Any, learning: Any, where: Any) -> tuple:
        y, inputs = jax.lax.scan(lambda x, params: (layer(x, params, rows), x), x, stack)
        return y, (inputs, rows, stack, learning, where)

    def backward(kept: tuple, dy: jax.Array) -> tuple:
        inputs, rows, stack, learning, where = kept

        def down(carry: tuple, given: tuple) -> tuple[tuple, None]:
            x, params, i = given

            def rest(dy: jax.Array, grads: Any) -> tuple:
                return dy, grads

            def pass_on(dy: jax.Array, grads: Any) -> tuple:
                _, back = jax.vjp(lambda x: layer(x, params, rows), x)
                return back(dy)[0], grads

            def learn(dy: jax.Array, grads: Any) -> tuple:
                wide = jax.tree.map(lambda p, g: p.astype(g.dtype), params, grads)
                _, back = jax.vjp(lambda x, params: layer(x, params, rows), x, wide)
                dx, new = back(dy)
                slot = jnp.argmax(where == i)
                return dx, jax.tree.map(
                    lambda old, one: jax.lax.dynamic_update_index_in_dim(old, one, slot, 0),
                    grads,
                    new,
                )

            reached = through | (i > where[0])
            kind = jnp.where((where == i).any(), 2, jnp.where(reached, 1, 0))
            return jax.lax.switch(kind, [rest, pass_on, learn], *carry), None

        zeros = jax.tree.map(jnp.zeros_like, learning)
        layers = (inputs, stack, jnp.arange(num_layers))
        (dx, grads), _ = jax.lax.scan(down, (dy, zeros), layers, reverse=True)
        return dx, None, None, grads, None

    run.defvjp(forward, backward)
    return run(x, rows, stack, learning, first.where)
