"""Scales in eight bits: double quantization (QLoRA, arXiv 2305.14314, section 3).

What is left of the scales when their mean is taken away is quantized in blocks of 256 to the
dynamic map (8-bit optimizers, arXiv 2110.02861, section 1.3): a sign, an exponent of ten in unary
and a linear fraction in the bits that remain. Blocks run over the scales in the order of Hugging
Face's weight, [F, G] row by row, so that stored bytes are those of bitsandbytes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant.codebook import TINY
from jaxtune.quant.qarray import NESTED_BLOCK, NestedScale

ZERO = 127  # the code of 0; 255 is 1
LUT_SIZE = 65536  # of bitsandbytes' table from a number to its code


def encode(scale: jax.Array) -> NestedScale:
    """Quantizes scales.

    Codes, absmax and offset are those of bitsandbytes 0.50.2 on a CPU, for up to 32,767 scales to
    the last bit. The mean of more depends on torch's number of threads; ours is that of one, and
    against others a scale right at the border between two codes may get the one beside it.

    Args:
        scale: float32 [..., G, F].
    """
    *stack, groups, columns = scale.shape
    flat = jnp.swapaxes(scale, -1, -2).reshape(*stack, columns * groups)
    offset = _mean(flat)
    codes, absmax = _encode_blocks(flat - offset[..., None])
    codes = jnp.swapaxes(codes.reshape(*stack, columns, groups), -1, -2)
    return NestedScale(codes, absmax, offset)


def _encode_blocks(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [..., n] -> codes uint8 [..., n] and absmax [..., ceil(n / 256)] of blocks of 256."""
    *stack, size = flat.shape
    count = math.ceil(size / NESTED_BLOCK)
    room = [(0, 0)] * len(stack) + [(0, count * NESTED_BLOCK - size)]
    blocks = jnp.pad(flat, room).reshape(*stack, count, NESTED_BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    inverse = 1 / jnp.maximum(absmax, TINY)
    normalised = jnp.clip(blocks * inverse[..., None], -1, 1)
    codes = jnp.searchsorted(_borders(), normalised, side="right", method="scan_unrolled")
    codes = jnp.where(absmax[..., None] > 0, codes, 0).astype(jnp.uint8)
    return codes.reshape(*stack, -1)[..., :size], absmax


def decode(scale: NestedScale) -> jax.Array:
    """float32 [..., G, F]: dynamic map of the codes * absmax of the block + offset."""
    *stack, groups, columns = scale.codes.shape
    absmax = jnp.repeat(scale.absmax, NESTED_BLOCK, axis=-1)[..., : columns * groups]
    absmax = jnp.swapaxes(absmax.reshape(*stack, columns, groups), -1, -2)
    return dynamic_value(scale.codes) * absmax + scale.offset[..., None, None]


def dynamic_value(codes: jax.Array) -> jax.Array:
    """The number in [-1, 1] of each code of the dynamic map, float32, without a gather.

    The distance n of a code from that of 0 is 2^e + f, f < 2^e: the middle of the f-th of 2^e
    equal parts of [0.1, 1], over 10^(6 - e) (bitsandbytes' functional.create_dynamic_map). The
    exponent and mantissa of n + 1/2 as a float32 are e and 1 + (f + 1/2) / 2^e.

    The division comes last: XLA for CPU fuses whatever it deems cheap into a scale's reader, and
    would decode a scale again for every weight that it belongs to.
    """
    distance = codes.astype(jnp.int32) - ZERO
    bits = jax.lax.bitcast_convert_type(jnp.abs(distance).astype(jnp.float32) + 0.5, jnp.int32)
    exponent = (bits >> 23) - 127
    mantissa = jax.lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F800000, jnp.float32)
    magnitude = jnp.where(exponent == 7, 1.0, 0.1 + 0.9 * (mantissa - 1))
    power = jnp.ones(codes.shape, jnp.float32)
    for e in range(6):
        power = jnp.where(exponent == e, 10.0 ** (6 - e), power)
    return jnp.sign(distance).astype(jnp.float32) * magnitude / power


@functools.cache
def dynamic_map() -> np.ndarray:
    """float32 [256], ascending: the numbers of the dynamic map as bitsandbytes stores them."""
    positive = []
    for e in range(7):
        # torch.linspace counts from the nearer end, with one rounding (a fused multiply-add).
        i, step = np.arange(2**e + 1), float(np.float32(0.9)) / 2**e
        edges = np.where(i < i[::-1], float(np.float32(0.1)) + step * i, 1 - step * i[::-1])
        edges = edges.astype(np.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (e - 6)))
    positive = np.concatenate(positive)
    return np.concatenate([-positive[::-1], [0], positive, [1]]).astype(np.float32)


def _mean(flat: jax.Array) -> jax.Array:
    """The mean of [..., n], to the last bit as torch 2 computes it on x86 in one thread.

    The order of the additions is that of `sum` in ATen/native/cpu/SumKernel.cpp: vectors of 8
    lanes in 4 streams, sums of chunks, sums of chunks of those, and so on for 4 levels.
    """
    vectors, tail = _cut(jnp.moveaxis(flat, -1, 0), 8)
    rows, rest = _cut(vectors, 4)
    chunk = 1 << max(4, math.ceil(math.log2(max(1, len(rows)))) // 4)
    levels = []
    for _ in range(3):
        chunks, left = _cut(rows, chunk)
        levels.append(_add(left))
        rows = _add(jnp.moveaxis(chunks, 1, 0))
    first, *streams = _add(jnp.stack([*levels, _add(rows)]))
    lanes = functools.reduce(jnp.add, [first, *rest, *streams])
    total = functools.reduce(jnp.add, [*tail, *lanes])
    # Scales are not negative. A divisor that XLA knew it would replace by its rounded reciprocal.
    return total / jnp.where(total > 0, jnp.float32(flat.shape[-1]), 1)


def _cut(rows: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """[n, ...] -> whole chunks [n // size, size, ...] and what is left."""
    count = len(rows) // size
    return rows[: count * size].reshape(count, size, *rows.shape[1:]), rows[count * size :]


def _add(rows: jax.Array) -> jax.Array:
    """The sum of [n, ...] for small n, from the first to the last."""
    return functools.reduce(jnp.add, rows, jnp.zeros(rows.shape[1:], rows.dtype))


@functools.cache
def _borders() -> np.ndarray:
    """float32 [255]: the smallest number in [-1, 1] that gets code k + 1, for every k.

    bitsandbytes (csrc/cpu_ops.cpp, quantize_cpu_impl) rounds a number to one of 65536 places in
    [-1, 1] and looks up the code nearest to that place. Codes grow with the number, so where they
    change is found by bisection, over the bits of float32.
    """
    table = dynamic_map()
    middles = np.float32(0.5) * (table[:-1] + table[1:])
    places = np.float32(-1) + np.arange(LUT_SIZE, dtype=np.float32) * 2 / np.float32(LUT_SIZE - 1)
    lut = np.searchsorted(middles, places, side="left")

    def code(number: np.ndarray) -> np.ndarray:
        half = ((number + np.float32(1)) * np.float32(0.5)).astype(np.float64)
        return lut[(half * (LUT_SIZE - 1) + 0.5).astype(np.float32).astype(np.int64)]

    # Signed integers that are ordered as the floats they stand for.
    one = int(np.float32(1).view(np.int32))
    low, high = np.full(255, -one), np.full(255, one)
    wanted = np.arange(1, 256)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = code(_ordered_float(middle)) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return _ordered_float(high)


def _ordered_float(order: np.ndarray) -> np.ndarray:
    magnitude = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -magnitude, magnitude)
