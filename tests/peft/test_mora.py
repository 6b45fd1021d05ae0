"""MoRA and MoSLoRA, which PEFT does not have, against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.nn.linear import Linear
from jaxtune.nn.params import AdapterConstant, AdapterParam, Policy
from jaxtune.peft import mora, moslora
from tests import oracle, tolerances


def transcribed(x: np.ndarray, matrix: np.ndarray, mora_type: str, d_out: int) -> np.ndarray:
    """The authors' forward pass for one vector, feature by feature; `matrix` is (out, in)."""
    size, d_in = matrix.shape[0], len(x)
    count = (d_in + size - 1) // size
    z = [[x[(b * size + j) % d_in] if b * size + j >= d_in else x[b * size + j]
          for j in range(size)] for b in range(count)]  # fmt: skip
    if mora_type == "sharing":
        y = matrix @ np.sum(z, axis=0)
    else:
        rows = []
        for b, block in enumerate(z):
            half = size // 2
            turned = np.zeros(size)
            for j in range(size):
                angle = b / 10000 ** (2 * (j % half) / size)
                other = -block[j + half] if j < half else block[j - half]
                turned[j] = block[j] * np.cos(angle) + other * np.sin(angle)
            rows.append(matrix @ turned)
        y = np.concatenate(rows)
    return np.array([y[i % len(y)] for i in range(d_out)])


@pytest.mark.parametrize(("mora_type", "size"), [("sharing", 5), ("rotation", 6)])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (8, 20), (13, 30)])
def test_mora_is_the_authors(mora_type: str, size: int, d_in: int, d_out: int):
    random = np.random.default_rng(0)
    x, g = random.normal(size=(3, d_in)), random.normal(size=(3, d_out))
    matrix = random.normal(size=(size, size))

    def dot(matrix: jax.Array) -> jax.Array:
        return (mora.change(jnp.asarray(x, jnp.float32), matrix, mora_type, d_out) * g).sum()

    value, gradient = jax.value_and_grad(dot)(jnp.asarray(matrix.T, jnp.float32))
    expected = np.stack([transcribed(row, matrix, mora_type, d_out) for row in x])
    assert abs(float(value) - (expected * g).sum()) <= 1e-5 * np.abs(expected * g).sum()
    slopes = np.zeros_like(matrix)
    for i in np.ndindex(matrix.shape):  # it is linear in the matrix
        unit = np.zeros_like(matrix)
        unit[i] = 1
        slopes[i] = sum(
            (transcribed(r, unit, mora_type, d_out) * s).sum() for r, s in zip(x, g, strict=True)
        )
    assert oracle.difference(gradient.T, slopes) <= tolerances.GRADIENTS
    kernel = random.normal(size=(d_in, d_out)).astype(np.float32)
    layer = mora.Layer(size, mora_type)
    merged = mora.merge("kernel", kernel, {"matrix": matrix.T.astype(np.float32)}, layer)
    assert oracle.difference(x @ merged, x @ kernel + expected) <= 1e-5


def test_sizes_of_mora():
    layers = {"q": (32, 32), "down": (64, 32)}
    found = mora.configure(mora.Config(rank=8), layers)
    assert found == {"q": mora.Layer(22, "rotation"), "down": mora.Layer(28, "rotation")}
    assert mora.configure(mora.Config(rank=8, mora_type="sharing"), layers)["q"].size == 23


def test_moslora_is_the_papers():
    random = np.random.default_rng(0)
    config = moslora.Config(rank=4, alpha=6.0)
    linear = Linear(16, 5, axes=("embed", "mlp"), policy=Policy(), rngs=nnx.Rngs(0))
    a, m, b = (random.normal(size=s).astype(np.float32) for s in ((16, 4), (4, 4), (4, 5)))
    adapter = moslora.MoSLoRA(linear, (config,), config)
    adapter.a, adapter.mixer, adapter.b = (AdapterParam(jnp.asarray(v)) for v in (a, m, b))
    adapter.scale = AdapterConstant(jnp.float32(config.scale))
    x = random.normal(size=(3, 16)).astype(np.float32)
    kernel = np.asarray(linear.kernel.get_value())
    expected = x @ kernel + 1.5 * (x @ a @ m @ b)
    assert oracle.difference(adapter(jnp.asarray(x), linear), expected) <= tolerances.OPS
    merged = moslora.merge("kernel", kernel, {"a": a, "mixer": m, "b": b}, config)
    assert oracle.difference(x @ merged, expected) <= tolerances.OPS
