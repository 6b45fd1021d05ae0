"""Double quantization against bitsandbytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant
from jaxtune.quant import nested
from tests.quant.oracle import (
    DTYPES,
    as_kernel,
    codes_of,
    dequantize,
    functional,
    quantize,
    random_weight,
)
from tests.quant.test_quantize import smollm2_weights

ONE = np.float32(1)
encode_blocks = jax.jit(nested._encode_blocks)


def test_dynamic_map():
    table = functional().create_dynamic_map().numpy()
    np.testing.assert_array_equal(nested.dynamic_map(), table)
    decoded = jax.jit(nested.dynamic_value)(jnp.arange(256, dtype=jnp.uint8))
    np.testing.assert_allclose(decoded, table, rtol=3e-7, atol=0)


def test_codes_at_every_border():
    import torch

    borders = nested._borders()
    drawn = np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32)
    numbers = np.concatenate([borders, np.nextafter(borders, -ONE), [0, -1], drawn])
    numbers = numbers[: len(numbers) // 255 * 255].reshape(-1, 255).astype(np.float32)
    for scale in (ONE, np.float32(0.3)):
        flat = (np.insert(numbers, 0, 1, axis=1) * scale).reshape(-1)
        expected, state = functional().quantize_blockwise(torch.from_numpy(flat), blocksize=256)
        codes, absmax = encode_blocks(flat)
        np.testing.assert_array_equal(codes, expected.numpy())
        np.testing.assert_array_equal(absmax, state.absmax.numpy())


def check(weight: Any, format: str) -> None:
    """Codes, nested codes, nested absmax and offset identical; dequantized values to 1e-6."""
    bnb = functional()
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=format, compress_statistics=True
    )
    kernel = as_kernel(weight)
    q = quantize(kernel, format, double_quant=True)
    assert isinstance(q.scale, quant.NestedScale)
    np.testing.assert_array_equal(quant.unpack(q.codes).T, codes_of(packed, weight.shape))
    np.testing.assert_array_equal(np.ravel(np.transpose(q.scale.codes)), state.absmax.numpy())
    np.testing.assert_array_equal(q.scale.absmax, state.state2.absmax.numpy())
    np.testing.assert_array_equal(q.scale.offset, state.offset.numpy())
    state.dtype = weight.float().dtype
    expected = bnb.dequantize_4bit(packed, state).numpy()
    dense = np.transpose(dequantize(q, jnp.float32))
    np.testing.assert_allclose(dense, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_those_of_bitsandbytes(dtype, format):
    for rows, columns in ((576, 192), (128, 7)):
        check(random_weight(rows, columns, dtype), format)


def test_smollm2():
    for weight, format in zip(smollm2_weights(2), ("nf4", "fp4"), strict=True):
        check(weight, format)


@pytest.mark.slow
def test_all_of_smollm2():
    for weight in smollm2_weights(1000):
        check(weight, "nf4")


@pytest.mark.parametrize("size", [1, 9, 100, 1728, 13_825, 32_767])
def test_mean_is_torchs(size):
    import torch

    scales = np.random.default_rng(size).uniform(1, 3, (2, size)).astype(np.float32)
    expected = [float(torch.from_numpy(row).mean()) for row in scales]
    np.testing.assert_array_equal(jax.jit(nested._mean)(scales), expected)


def test_mean_of_many_scales():
    scales = np.random.default_rng(0).uniform(1, 3, 900_000).astype(np.float32)
    mean = jax.jit(nested._mean)(scales)
    np.testing.assert_allclose(mean, scales.astype(np.float64).mean(), rtol=1e-6)
