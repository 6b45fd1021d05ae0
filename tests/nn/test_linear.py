"""Who multiplies with a quantized weight."""

import jax
import numpy as np
import pytest

from jaxtune import ops, quant
from jaxtune.nn import linear
from jaxtune.nn.params import Policy, suited_policy

CHOSEN = {"int8": "xla", "int8_block": "pallas_tpu", "int4": "pallas_tpu", "nf4": "pallas_tpu"}


def kernel() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (128, 64))


@pytest.mark.parametrize("format", CHOSEN)
def test_by_the_weight_unless_one_is_named(format: str, monkeypatch: pytest.MonkeyPatch):
    weight = quant.quantize(kernel(), format, double_quant=format == "nf4")
    asked: list[str] = []

    def multiplied(x: jax.Array, w: object, *, implementation: str) -> jax.Array:
        asked.append(implementation)
        return x

    monkeypatch.setattr(ops, "matmul", multiplied)
    x = jax.numpy.ones((1, 2, 128))
    for policy in (suited_policy("tpu"), Policy(matmul="pallas_tpu"), suited_policy("gpu")):
        linear.product(x, weight, ("embed", "mlp"), policy)
    assert asked == [CHOSEN[format], "pallas_tpu", "xla"]


def test_a_dense_weight_is_xlas():
    x = jax.random.normal(jax.random.key(1), (1, 2, 128))
    got = linear.product(x, kernel(), ("embed", "mlp"), Policy(matmul="auto"))
    np.testing.assert_allclose(got, x @ kernel(), rtol=1e-5, atol=1e-5)
