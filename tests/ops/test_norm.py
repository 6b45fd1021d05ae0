from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from tests import tolerances
from tests.oracle import difference


def plain(x: Any, scale: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients(dtype: Any):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.normal(size=(2, 3, 16)), dtype) for _ in range(2))
    scale = jnp.asarray(random.uniform(0.5, 1.5, 16), dtype)
    y, pullback = jax.vjp(lambda x, s: ops.rms_norm(x, s, 1e-3), x, scale)
    expected, oracle = jax.vjp(plain, x.astype(jnp.float32), scale.astype(jnp.float32))
    got, right = (y, *pullback(dy)), (expected, *oracle(dy.astype(jnp.float32)))
    bound = tolerances.OPS if dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    for array, exact in zip(got, right, strict=True):
        assert array.dtype == dtype
        assert difference(array, exact) <= bound


def plain_layer(x: Any, scale: Any, bias: Any) -> Any:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return plain(x, scale) + bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype: Any):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.normal(0.5, 1, (2, 3, 16)), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(random.uniform(0.5, 1.5, 16), dtype) for _ in range(2))
    y, pullback = jax.vjp(lambda *given: ops.layer_norm(*given, 1e-3), x, scale, bias)
    exact = [value.astype(jnp.float32) for value in (x, scale, bias)]
    expected, oracle = jax.vjp(plain_layer, *exact)
    got, right = (y, *pullback(dy)), (expected, *oracle(dy.astype(jnp.float32)))
    bound = tolerances.OPS if dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    for array, value in zip(got, right, strict=True):
        assert array.dtype == dtype
        assert difference(array, value) <= bound


def test_zeros_stay_finite():
    x, scale = jnp.zeros((1, 8)), jnp.ones(8)
    value, gradient = jax.value_and_grad(lambda x: ops.rms_norm(x, scale, 1e-6).sum())(x)
    assert value == 0 and np.isfinite(gradient).all()
