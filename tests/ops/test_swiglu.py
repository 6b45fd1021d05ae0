from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from tests import tolerances
from tests.oracle import difference


def plain(gate: Any, up: Any) -> Any:
    return gate / (1 + jnp.exp(-gate)) * up


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients(dtype: Any):
    random = np.random.default_rng(0)
    gate, up, dy = (jnp.asarray(3 * random.normal(size=(4, 16)), dtype) for _ in range(3))
    exact = [array.astype(jnp.float32) for array in (gate, up, dy)]
    y, pullback = jax.vjp(ops.swiglu, gate, up)
    expected, oracle = jax.vjp(plain, *exact[:2])
    bound = tolerances.OPS if dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    for array, right in zip((y, *pullback(dy)), (expected, *oracle(exact[2])), strict=True):
        assert array.dtype == dtype
        assert difference(array, right) <= bound
