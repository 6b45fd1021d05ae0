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
    blocks_of,
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


def check(weight: Any, format: str) -> tuple[int, int]:
    """Compares all of a doubly quantized weight.

    Returns:
        how many scales got another code because our mean is not the last bit of torch's, and how
        many scales there are.
    """
    bnb = functional()
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=format, compress_statistics=True
    )
    kernel = as_kernel(weight)
    q = quantize(kernel, format, double_quant=True)
    assert isinstance(q.scale, quant.NestedScale)
    np.testing.assert_array_equal(quant.unpack(q.codes).T, codes_of(packed, weight.shape))
    np.testing.assert_allclose(q.scale.offset, state.offset.numpy(), rtol=3e-7)
    np.testing.assert_allclose(q.scale.absmax, state.state2.absmax.numpy(), rtol=1e-6)

    # Given its mean, the codes are bitsandbytes'.
    flat = blocks_of(quantize(kernel, format).scale)
    codes, _ = encode_blocks(flat - np.float32(state.offset))
    np.testing.assert_array_equal(codes, state.absmax.numpy())
    # With its codes, the values are too.
    scale = quant.NestedScale(
        jnp.asarray(codes.reshape(q.scale.codes.shape[::-1]).T),
        jnp.asarray(state.state2.absmax.numpy()),
        jnp.asarray(state.offset.numpy()),
    )
    same = quant.QArray(q.codes, scale, format=format)
    dense = dequantize(same, jnp.float32)
    state.dtype = weight.float().dtype
    expected = bnb.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(dense.T, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    own = np.ravel(np.transpose(q.scale.codes)).astype(int) - state.absmax.numpy()
    assert np.abs(own).max() <= 1
    return int((own != 0).sum()), own.size


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_those_of_bitsandbytes(dtype, format):
    for shape in ((576, 192), (128, 7)):
        differ, _ = check(random_weight(shape[0], shape[1], dtype), format)
        assert differ <= 1


def test_smollm2():
    for weight, format in zip(smollm2_weights(2), ("nf4", "fp4"), strict=True):
        differ, total = check(weight, format)
        assert differ <= max(2, total * 1e-4)


@pytest.mark.slow
def test_all_of_smollm2():
    counts = [check(weight, "nf4") for weight in smollm2_weights(1000)]
    differ, total = np.sum(counts, axis=0)
    print(f"{differ} of {total} scales have another code")
    assert differ <= total * 1e-4


def test_mean_of_many_scales():
    scales = np.random.default_rng(0).uniform(1, 3, (64, 14_000)).astype(np.float32)
    offset = jax.jit(nested.encode)(scales).offset
    np.testing.assert_allclose(offset, scales.astype(np.float64).mean(), rtol=2e-7)
