"""The weight gradient of a grouped product on TPU: JAX's megablox kernel.

XLA for TPU has a kernel of its own for rows times matrices, but makes the gradient of the matrices
a product of all rows with all groups, masked: E times the work (libtpu 0.0.42).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.typing import DTypeLike

BLOCK = (512, 1024)  # rows and columns of the result that are summed at once
ROWS = (128, 512)  # fewest and most rows of x in a tile


def outer(
    x: jax.Array, g: jax.Array, sizes: jax.Array, dtype: DTypeLike, *, interpret: Any = False
) -> jax.Array:
    """The sums of x^T g over the rows of each group, of an empty one 0: [E, D, F].

    Args:
        x: [M, D], float32 or bfloat16, the rows of a group side by side.
        g: [M, F], in x's dtype.
        sizes: int32 [E], rows of each group; their sum is M or less.
        dtype: of the result; sums are float32.
        interpret: run the kernel in pallas' interpreter (for tests).
    """
    tile = _tile(x.shape[0], sizes.shape[0])
    missing = -x.shape[0] % tile
    x, g = (jnp.pad(rows, ((0, missing), (0, 0))) for rows in (x, g))
    blocks = (min(BLOCK[0], x.shape[1]), min(BLOCK[1], g.shape[1]))
    return tgmm(x.T, g, sizes, dtype, (tile, *blocks), interpret=interpret)


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: a group's first and last are computed whole, so no more than a group has."""
    fewest, most = ROWS
    return max(fewest, min(most, 1 << (rows // groups).bit_length() >> 1))
