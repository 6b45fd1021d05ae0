"""What the rules of a gradient written by hand find out about their operands."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxtune.quant import QArray

Weight = jax.Array | QArray


def unwrap(w: Any) -> tuple[Weight, bool]:
    """The weight behind its primals, and whether a gradient of any part of it is asked for."""
    leaves, structure = jax.tree.flatten(w, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    values = jax.tree.unflatten(structure, [leaf.value for leaf in leaves])
    return values, any(leaf.perturbed for leaf in leaves)


def materialize(g: jax.Array | SymbolicZero) -> jax.Array:
    """A cotangent as an array."""
    return jnp.zeros(g.aval.shape, g.aval.dtype) if isinstance(g, SymbolicZero) else g  # pyright: ignore[reportAttributeAccessIssue]
