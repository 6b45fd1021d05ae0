"""Four-bit integers: value = (code - zero) * scale.

What is quantized here is symmetric: scale = absmax / 7 and codes 1..15 stand for -7..7 (0, which
would be -8, is not used). Files of others may bring a zero of their own for each block.
"""

import jax
import jax.numpy as jnp

from jaxtune.quant import int8

LARGEST = 7.0
MIDDLE = 8


def encode(blocks: jax.Array, absmax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks to the nearest code, halves to even.

    Args:
        blocks: float32 [..., G, rows, F].
        absmax: float32 [..., G, F], the largest magnitude in each block.

    Returns:
        codes 1..15, uint8 [..., G, rows, F], and scale float32 [..., G, F].
    """
    codes = int8.round_to(blocks, absmax, LARGEST) + MIDDLE
    return codes.astype(jnp.uint8), absmax / LARGEST


def values(codes: jax.Array) -> jax.Array:
    """float32 code - 8, the integers of symmetric codes."""
    return (codes.astype(jnp.int8) - MIDDLE).astype(jnp.float32)
