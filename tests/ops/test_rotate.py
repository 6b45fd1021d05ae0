from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.nn.rope import Rope, rope_table
from tests import tolerances
from tests.oracle import difference


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_is_a_complex_product(dtype: Any):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.normal(size=(2, 5, 3, 8)), dtype) for _ in range(2))
    positions = np.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    table = rope_table(jnp.asarray(positions), Rope(head_dim=8, theta=100.0))
    frequencies = 100.0 ** (-np.arange(4) / 4)
    turn = np.exp(1j * positions[..., None] * frequencies)[:, :, None]

    def plain(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
        pairs = (x[..., :4] + 1j * x[..., 4:]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    y, pullback = jax.vjp(lambda x: ops.rotate(x, *table), x)
    (dx,) = pullback(dy)
    bound = tolerances.OPS if dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    assert y.dtype == dx.dtype == dtype
    assert difference(y, plain(np.asarray(x, np.float64), turn)) <= bound
    assert difference(dx, plain(np.asarray(dy, np.float64), turn.conj())) <= bound
