"""Eight-bit integers: value = code * scale, scale = absmax / 127.

With one scale per column these are the codes of LLM.int8 (arXiv 2208.07339), which bitsandbytes
calls CB, and its row statistics SCB are 127 * scale: a row of Hugging Face's weight is a column of
the kernel. Outlier columns, LLM.int8's second half, concern activations and are not stored.
"""

import jax
import jax.numpy as jnp

LARGEST = 127.0


def encode(blocks: jax.Array, absmax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks to the nearest code, halves to even.

    The operations and their order are those of `int8_vectorwise_quant` of bitsandbytes 0.50.2
    (backends/default/ops.py).

    Args:
        blocks: float32 [..., G, rows, F].
        absmax: float32 [..., G, F], the largest magnitude in each block.

    Returns:
        codes int8 [..., G, rows, F] and scale float32 [..., G, F].
    """
    return round_to(blocks, absmax, LARGEST), absmax / LARGEST


def round_to(blocks: jax.Array, absmax: jax.Array, largest: float) -> jax.Array:
    """int8 round(blocks * (largest * (1 / absmax))); 0 where a block has no other number."""
    factor = jnp.where(absmax > 0, (1 / absmax) * largest, 0)
    return jnp.round(blocks * factor[..., None, :]).astype(jnp.int8)


def values(codes: jax.Array) -> jax.Array:
    """int8 codes as float32."""
    return codes.astype(jnp.float32)
