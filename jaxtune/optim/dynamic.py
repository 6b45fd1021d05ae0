"""The dynamic 8-bit numbers of bitsandbytes, by arithmetic instead of tables.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.3;
the values are those of bitsandbytes 0.50.2, `functional.create_dynamic_map`. Seven decades from
1e-7 to 1; decade d is cut into 2^d cells when signed and 2^(d+1) when not, and its numbers are the
cells' centres; besides there are 0 and 1. Codes count the numbers in ascending order, so that 0 is
code 127 when signed and code 0 when not.

There is no table to look in: a gather per element is the slowest thing a TPU can do, and this
arithmetic is lost in the optimizer's memory traffic.
"""

import jax
import jax.numpy as jnp

DECADES = 7
EXPONENT_BITS = 23  # of float32, below its exponent


def _number(decade: int, cell: int, signed: bool) -> float:
    """The centre of a cell; -1 is the last one."""
    cells = 2 ** (decade + (not signed))
    return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (cell % cells + 0.5) / cells)


def _power_of_ten(decade: jax.Array) -> jax.Array:
    """10^decade for int32 0..7."""
    power = jnp.where(decade & 1, 10.0, 1.0)
    power *= jnp.where(decade & 2, 100.0, 1.0)
    return power * jnp.where(decade & 4, 10000.0, 1.0)


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """Codes of the nearest numbers.

    Args:
        x: float32, in [-1, 1], or in [0, 1] if not signed.

    Returns:
        uint8 of the same shape.
    """
    size, first = jnp.abs(x), 1 if signed else 2
    between = [(_number(d - 1, -1, signed) + _number(d, 0, signed)) / 2 for d in range(1, DECADES)]
    decade = jnp.zeros(x.shape, jnp.int32)
    for bound in between:
        decade += size >= bound
    cells = (first << decade).astype(jnp.float32)
    part = size * _power_of_ten(DECADES - 1 - decade)  # of the decade, in [0.1, 1]
    cell = jnp.clip(jnp.floor((part - 0.1) * (cells / 0.9)), 0, cells - 1)
    rank = cells - first + cell + 1
    rank = jnp.where(size < _number(0, 0, signed) / 2, 0, rank)
    one = 128 if signed else 255
    rank = jnp.where(size > (_number(DECADES - 1, -1, signed) + 1) / 2, one, rank)
    if signed:  # there is no -1
        rank = jnp.where(x < 0, 127 - jnp.minimum(rank, 127), 127 + rank)
    return rank.astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """The numbers of uint8 codes, as float32."""
    code, first = codes.astype(jnp.float32), 1 if signed else 2
    rank = jnp.abs(code - 127) if signed else code
    # Decade d has the places from its number of cells, a power of two, to twice that: the cells are
    # the place without its mantissa, and the decade is in its exponent.
    place = rank + (first - 1)
    bits = jax.lax.bitcast_convert_type(place, jnp.int32) >> EXPONENT_BITS
    cells = jax.lax.bitcast_convert_type(bits << EXPONENT_BITS, jnp.float32)
    unit = _power_of_ten(bits - (127 + first - 1)) * 10.0 ** (1 - DECADES)
    size = unit * (0.1 + 0.9 * (place - cells + 0.5) / cells)
    size = jnp.where(rank == 0, 0.0, size)
    size = jnp.where(rank == (128 if signed else 255), 1.0, size)
    return jnp.where(code < 127, -size, size) if signed else size
