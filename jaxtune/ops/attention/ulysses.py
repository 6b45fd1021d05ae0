"""Attention over rows whose tokens are spread over devices: heads are exchanged for tokens.

With all-to-all each device gets whole rows of a part of the heads, and gives the output back
(DeepSpeed-Ulysses, arXiv 2309.14509). Every implementation of attention will do, and the causal
half of the work is shared evenly; the devices must divide the key heads.

To be called where the mesh axis is manual, inside `shard_map`.
"""

from collections.abc import Callable

import jax
from jax import lax

from jaxtune.ops.attention.mask import Mask

Attention = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, axis: str, attention: Attention
) -> jax.Array:
    """Output [B, t, N, H] of the t tokens of this device.

    Args:
        q: [B, t, N, H].
        k, v: [B, t, K, H].
        mask: its arrays are of the t tokens.
        axis: the mesh axis along which the row is cut.
        attention: (q, k, v, mask) -> y, for whole rows of N / shards heads.
    """
    rows = jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), mask)
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    y = attention(q, k, v, rows)
    return lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)
