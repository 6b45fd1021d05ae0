"""8-bit Adam against bitsandbytes 0.50.2 on CPU.

bitsandbytes' compiled quantizer for float32 on CPU rounds to a coarse grid (2e-12 becomes 2e-5), so
its optimizer is run here with its own reference quantizer, which finds the nearest number and is
what its GPU kernels do.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.optim.adamw8bit import dequantize, quantize, scale_by_adam8bit, scale_shape
from jaxtune.optim.dynamic import decode, encode
from tests import tolerances
from tests.oracle import difference

AXES = {
    "layers.0.up.kernel": ("embed", "mlp"),  # columns of two whole blocks
    "layers.0.down.kernel": ("mlp", "embed"),  # flattened
    "layers.0.small.kernel": ("embed", "mlp"),
    "layers.0.norm.scale": ("embed",),
    "embed.table": ("vocab", "embed"),
}
SHAPES = {
    "layers.0.up.kernel": (2, 512, 24),
    "layers.0.down.kernel": (2, 50, 90),
    "layers.0.small.kernel": (2, 16, 16),
    "layers.0.norm.scale": (2, 500),
    "embed.table": (128, 64),
}


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_and_rounding_are_those_of_bitsandbytes(bitsandbytes: Any, signed: bool):
    numbers = bitsandbytes.functional.create_dynamic_map(signed).numpy()
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(decode(jnp.asarray(codes), signed=signed), numbers, rtol=3e-7)
    np.testing.assert_array_equal(encode(jnp.asarray(numbers), signed=signed), codes)
    random = np.random.default_rng(0)
    x = (random.random(100_000) ** random.integers(1, 9, 100_000)).astype(np.float32)
    x *= random.choice([-1, 1], 100_000) if signed else 1
    middles = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2
    nearest = np.searchsorted(middles, x.astype(np.float64))
    np.testing.assert_array_equal(encode(jnp.asarray(x), signed=signed), nearest)


@pytest.mark.parametrize("shape", [(512, 3), (3, 512, 8), (40, 70), (2, 3, 16, 300), (1, 1)])
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_run_down_the_columns(bitsandbytes: Any, shape: tuple[int, ...], signed: bool):
    import torch

    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) ** 3
    x = x if signed else np.abs(x)
    codes, scale = jax.jit(quantize, static_argnames="signed")(jnp.asarray(x), signed=signed)
    assert codes.shape == shape and scale.shape == scale_shape(shape)
    book = bitsandbytes.functional.create_dynamic_map(signed)
    layers = (array.reshape(-1, *array.shape[-2:]) for array in (x, codes, scale))
    for layer, ours, ours_scale in zip(*layers, strict=True):
        theirs = torch.tensor(layer.T.copy()).double()  # Hugging Face's layout
        theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(theirs, book, 256)
        np.testing.assert_array_equal(np.asarray(ours).T, theirs.numpy())
        np.testing.assert_array_equal(np.asarray(ours_scale).T.ravel(), absmax.numpy())
    back = np.asarray(dequantize(codes, scale, signed=signed))
    assert np.abs(back - x).max() <= np.abs(x).max() / (2 * 64)


def test_blocks_of_zeros(bitsandbytes: Any):
    codes, scale = quantize(jnp.zeros((512, 4)), signed=True)
    assert not np.asarray(scale).any()
    assert not np.asarray(dequantize(codes, scale, signed=True)).any()


def gradients(seed: int) -> dict[str, jax.Array]:
    """Of sizes over two orders of magnitude: of more, second moments would round to 0."""
    random = np.random.default_rng(seed)
    grads = {}
    for name, shape in SHAPES.items():
        grads[name] = 10.0 ** random.uniform(-2, 0, shape) * random.normal(size=shape)
    return {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}


def in_their_layout(name: str, array: Any) -> list[np.ndarray]:
    layers = list(np.asarray(array)) if len(SHAPES[name]) > len(AXES[name]) else [np.asarray(array)]
    return [layer.T.copy() if name.endswith("kernel") else layer for layer in layers]


def test_twenty_steps_are_those_of_bitsandbytes(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch):
    import torch
    from bitsandbytes.backends.cpu import ops

    def quantize_exactly(x: Any, code: Any, absmax: Any, out: Any, blocksize: int) -> None:
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, blocksize)
        out.copy_(codes)
        absmax.copy_(scales)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize_exactly)
    start = gradients(99)
    theirs = {
        f"{name} {i}": torch.nn.Parameter(torch.tensor(layer))
        for name, array in start.items()
        for i, layer in enumerate(in_their_layout(name, array))
    }
    numbers = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    table = theirs.pop("embed.table 0")
    adamw = bitsandbytes.optim.AdamW8bit(theirs.values(), **numbers)
    exact = torch.optim.AdamW([table], **numbers)
    tx = optax.chain(
        scale_by_adam8bit(0.9, 0.95, 1e-8, AXES),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    params, update = start, jax.jit(tx.update)
    state = tx.init(params)
    for step in range(20):
        grads = gradients(step)
        for name, grad in grads.items():
            for i, layer in enumerate(in_their_layout(name, grad)):
                param = theirs.get(f"{name} {i}", table)
                param.grad = torch.tensor(layer)
        adamw.step()
        exact.step()
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, array in params.items():
            for i, layer in enumerate(in_their_layout(name, array)):
                param = theirs.get(f"{name} {i}", table)
                change = np.abs(layer - param.detach().numpy())
                assert np.quantile(change, 0.999) <= 1e-5, (step, name)
                assert change.max() <= 0.01, (step, name)
    adam = state[0]
    coded = {"layers.0.up.kernel", "layers.0.down.kernel"}
    assert adam.m_scale.keys() == adam.v_scale.keys() == coded
    for name in coded:
        for i, m in enumerate(in_their_layout(name, adam.m[name])):
            kept, v = adamw.state[theirs[f"{name} {i}"]], in_their_layout(name, adam.v[name])[i]
            assert (m == kept["state1"].numpy()).mean() >= 0.999
            assert (v == kept["state2"].numpy()).mean() >= 0.999
            scales = np.asarray(adam.m_scale[name][i]).T.ravel()
            assert difference(scales, kept["absmax1"].numpy()) <= tolerances.OPS


def test_bytes_of_state():
    """bitsandbytes' 2 bytes and a float32 scale of each moment for 256 elements."""
    axes = {"layers.0.up.kernel": ("embed", "mlp")}
    tx = scale_by_adam8bit(0.9, 0.999, 1e-8, axes)
    shape = jax.ShapeDtypeStruct((32, 4096, 14336), jnp.float32)
    state = jax.eval_shape(tx.init, {"layers.0.up.kernel": shape})
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert total / shape.size == pytest.approx(2 + 8 / 256, abs=1e-6)
