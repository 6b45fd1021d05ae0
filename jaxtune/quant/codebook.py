"""Four-bit codes that index a book of 16 numbers in [-1, 1]: value = book[code] * absmax.

nf4 are quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E); fp4 is the 4-bit
float of bitsandbytes, not OCP's e2m1: a sign and three bits in a table order of its own. Numbers,
thresholds, ties and the order of the operations are those of bitsandbytes 0.50.2 on a CPU
(functional.get_4bit_type, backends/default/ops.py), so that codes are identical.
"""

import jax
import jax.numpy as jnp
import numpy as np

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48]  # / 192

BOOKS = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32) / np.float32(192)}

# Codes by value. Of fp4's two zeros, numbers up to and including 0 get code 0, larger ones code 8.
ORDER = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}

# The smallest divisor that is a normal number: XLA takes subnormals for 0.
TINY = float(np.finfo(np.float32).tiny)


def encode(blocks: jax.Array, absmax: jax.Array, book: str) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks to the nearest number of a book, halves to the smaller one.

    Args:
        blocks: float32 [..., G, rows, F].
        absmax: float32 [..., G, F], the largest magnitude in each block.
        book: "nf4" or "fp4".

    Returns:
        codes 0..15, uint8 [..., G, rows, F], and scale = absmax.
    """
    inverse = 1 / jnp.maximum(absmax, TINY)
    normalised = jnp.clip(blocks * inverse[..., None, :], -1, 1)
    ascending = BOOKS[book][ORDER[book]]
    rank = jnp.zeros(blocks.shape, jnp.uint8)
    for threshold in (ascending[:-1] + ascending[1:]) / 2:
        rank += (normalised > threshold).astype(jnp.uint8)
    codes = rank if book == "nf4" else select(rank, ORDER[book])
    return codes, absmax


def select(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] for codes 0..15 without a gather: a tree of selects on the bits of the code.

    Every step is elementwise, so XLA fuses the tree with what is before and after it.
    """
    level = list(table)
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        level = [
            jnp.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def values(codes: jax.Array, book: str) -> jax.Array:
    """float32 book[codes]."""
    return select(codes, BOOKS[book])
