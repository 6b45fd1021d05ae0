"""Quantized kernels against bitsandbytes, whose weight [F, D] is the kernel [D, F] transposed."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant

SHAPES = [(576, 192), (128, 7), (192, 1)]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes' functions; importing it warns about a package for other processors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes").functional


def random_weight(rows: int, columns: int, dtype: str, seed: int = 0):
    """A torch weight [F, D] with blocks of zeros, outliers and tiny numbers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, rows, generator=generator) * 0.02
    weight[0, :64] = 0
    weight[columns // 2, 5] = 3
    weight[columns // 3] *= 1e-4
    weight[-1, 64:70] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.0])
    return weight.to(getattr(torch, dtype))


def as_kernel(weight) -> jax.Array:
    """The jax kernel [D, F] of a torch weight, in its dtype."""
    dtype = DTYPES[str(weight.dtype).removeprefix("torch.")]
    return jnp.asarray(weight.float().numpy().T).astype(dtype)


def codes_of(packed, shape: tuple[int, int]) -> np.ndarray:
    """bitsandbytes' codes, two in a byte, the first in the high half -> [F, D]."""
    packed = packed.numpy().reshape(-1)
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(shape)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_those_of_bitsandbytes(bnb, shape, dtype, format):
    weight = random_weight(*shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=format)
    kernel = as_kernel(weight)
    q = jax.jit(lambda kernel: quant.quantize(kernel, format))(kernel)

    np.testing.assert_array_equal(quant.unpack(q.codes).T, codes_of(packed, shape[::-1]))
    np.testing.assert_array_equal(np.ravel(np.transpose(q.scale)), state.absmax.numpy())
    dense = jax.jit(lambda q: quant.dequantize(q, kernel.dtype))(q)
    expected = bnb.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(dense.astype(jnp.float32).T, expected.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_llm_int8(bnb, shape, dtype):
    weight = random_weight(*shape, dtype)
    codes, statistics, _ = bnb.int8_vectorwise_quant(weight)
    q = jax.jit(lambda kernel: quant.quantize(kernel, "int8"))(as_kernel(weight))
    np.testing.assert_array_equal(q.codes.T, codes.numpy())
    np.testing.assert_allclose(q.scale[0] * 127, statistics.numpy(), rtol=1e-6)
    expected = bnb.int8_vectorwise_dequant(codes, statistics).numpy()
    np.testing.assert_allclose(quant.dequantize(q, jnp.float32).T, expected, rtol=1e-6)
