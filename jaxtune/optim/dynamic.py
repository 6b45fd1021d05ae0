"""The dynamic 8-bit numbers of bitsandbytes, by arithmetic instead of tables.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.3;
the values are those of bitsandbytes 0.50.2, `functional.create_dynamic_map`. Seven decades from
1e-7 to 1; decade i is cut into 2^i cells when signed and 2^(i+1) when not, and its numbers are the
cells' centres; besides there are 0 and 1. Codes count the numbers in ascending order, so that 0 is
code 127 when signed and code 0 when not. Neither direction needs a table: a gather per element is
the slowest thing a TPU can do, and a few selects are lost in the optimizer's memory traffic.
"""

import jax
import jax.numpy as jnp

DECADES = 7


def _numbers(decade: int, cell: int, signed: bool) -> float:
    """The number in the middle of a cell."""
    cells = _cells(decade, signed)
    return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (cell + 0.5) / cells)


def _cells(decade: int, signed: bool) -> int:
    return 2**decade if signed else 2 ** (decade + 1)


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """Codes of the nearest numbers.

    Args:
        x: float32, in [-1, 1], or in [0, 1] if not signed.

    Returns:
        uint8 of the same shape.
    """
    size, first = jnp.abs(x), _cells(0, signed)
    cells, unit = jnp.float32(first), jnp.float32(10.0 ** (DECADES - 1))
    for decade in range(1, DECADES):
        last = _numbers(decade - 1, _cells(decade - 1, signed) - 1, signed)
        there = size >= (last + _numbers(decade, 0, signed)) / 2
        cells = jnp.where(there, _cells(decade, signed), cells)
        unit = jnp.where(there, 10.0 ** (DECADES - 1 - decade), unit)
    cell = jnp.clip(jnp.floor((size * unit - 0.1) * (cells / 0.9)), 0, cells - 1)
    rank = cells - first + cell + 1
    largest = _numbers(DECADES - 1, _cells(DECADES - 1, signed) - 1, signed)
    rank = jnp.where(size < _numbers(0, 0, signed) / 2, 0, rank)
    one = 128 if signed else 255
    rank = jnp.where(size > (largest + 1) / 2, one, rank)
    if signed:  # there is no -1
        rank = jnp.where(x < 0, 127 - jnp.minimum(rank, 127), 127 + rank)
    return rank.astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """The numbers of uint8 codes, as float32."""
    code, first = codes.astype(jnp.float32), _cells(0, signed)
    rank = jnp.abs(code - 127) if signed else code
    place = rank - 1 + first  # decade i takes the places from its number of cells to twice that
    cells, unit = jnp.float32(first), jnp.float32(10.0 ** (1 - DECADES))
    for decade in range(1, DECADES):
        there = place >= _cells(decade, signed)
        cells = jnp.where(there, _cells(decade, signed), cells)
        unit = jnp.where(there, 10.0 ** (decade - DECADES + 1), unit)
    size = unit * (0.1 + 0.9 * (place - cells + 0.5) / cells)
    size = jnp.where(rank == 0, 0.0, size)
    size = jnp.where(rank == (128 if signed else 255), 1.0, size)
    return jnp.where(code < 127, -size, size) if signed else size
