import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxtune import ops
from jaxtune.ops.matmul import xla
from jaxtune.quant import quantize
from tests import tolerances
from tests.ops import matmul_cases
from tests.oracle import difference

# With 12 x 10 weights and rank 3 the merged path is taken from 6 rows on, in float32.
ROWS = {"merged": (2, 9), "factored": (1, 2)}


def arrays(*shapes: tuple[int, ...]) -> list[Any]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def tolerance(dtype: Any) -> float:
    return tolerances.OPS if dtype == jnp.float32 else tolerances.OPS_BFLOAT16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16])
def test_matmul(dtype: Any, w_dtype: Any):
    x, w, dy = arrays((2, 5, 12), (12, 10), (2, 5, 10))
    x, w, dy = x.astype(dtype), w.astype(w_dtype), dy.astype(dtype)
    y, pullback = jax.vjp(ops.matmul, x, w)
    exact = [array.astype(jnp.float32) for array in (x, w, dy)]
    expected, plain = jax.vjp(jnp.matmul, *exact[:2])
    got, right = (y, *pullback(dy)), (expected, *plain(exact[2]))
    assert [array.dtype for array in got] == [dtype, dtype, w_dtype]
    for array, oracle in zip(got, right, strict=True):
        assert difference(array, oracle) <= max(map(tolerance, (dtype, w_dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_adapted_matmul(rows: str, dtype: Any):
    leading = ROWS[rows]
    x, w, a, b, dy = arrays((*leading, 12), (12, 10), (12, 3), (3, 10), (*leading, 10))
    x, dy = x.astype(dtype), dy.astype(dtype)

    def plain(x: Any, a: Any, b: Any) -> Any:
        return x @ w + x @ a @ b

    y, pullback = jax.vjp(lambda x, a, b: ops.adapted_matmul(x, w, a, b), x, a, b)
    got = (y, *pullback(dy))
    expected, oracle = jax.vjp(plain, x.astype(jnp.float32), a, b)
    right = (expected, *oracle(dy.astype(jnp.float32)))
    assert [array.dtype for array in got] == [dtype, dtype, jnp.float32, jnp.float32]
    for name, array, exact in zip(("y", "dx", "da", "db"), got, right, strict=True):
        bound = 2 * tolerance(dtype) if name != "y" else tolerance(dtype)
        assert difference(array, exact) <= bound, name


def products(function: Any, *operands: Any) -> set[tuple[int, ...]]:
    """Shapes of the results of all matrix products in a function."""
    found = set()

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.add(equation.outvars[0].aval.shape)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*operands).jaxpr)
    return found


def test_path_by_number_of_rows_and_dtype():
    x, w, a, b = arrays((2, 9, 12), (12, 10), (12, 3), (3, 10))
    assert (12, 10) in products(ops.adapted_matmul, x, w, a, b)
    assert (12, 10) not in products(ops.adapted_matmul, x[:1, :2], w, a, b)
    assert (12, 10) not in products(ops.adapted_matmul, x.astype(jnp.bfloat16), w, a, b)


def test_gradient_of_a_frozen_weight_is_not_computed():
    x, w = arrays((2, 5, 12), (12, 10))

    def total(x: Any, w: Any) -> Any:
        return jnp.square(ops.matmul(x, w)).sum()

    assert not {(12, 10), (10, 12)} & products(jax.grad(total, 0), x, w)
    assert (12, 10) in products(jax.grad(total, 1), x, w)


def test_gradient_of_an_adapters_base_is_refused():
    x, w, a, b = arrays((2, 5, 12), (12, 10), (12, 3), (3, 10))
    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.grad(lambda w: ops.adapted_matmul(x, w, a, b).sum())(w)


def test_small_adapter_survives_bfloat16():
    """A correction below the base's rounding would vanish if it were added to the weight."""
    x, w, a, b = arrays((4, 12), (12, 10), (12, 3), (3, 10))
    small = ops.adapted_matmul(x.astype(jnp.bfloat16), 0 * w, 1e-4 * a, b)
    assert difference(small, 1e-4 * (x @ a @ b)) <= tolerances.OPS_BFLOAT16


def test_one_product_with_joined_operands_is_the_sum_of_two():
    """The form for TPU, which no test on CPU would take."""
    x, w, u, v = arrays((2, 5, 12), (12, 10), (3, 2, 5), (3, 10))
    assert difference(xla.joined(x, w, u, v), xla.added(x, w, u, v)) <= tolerances.OPS


def test_quantized_weights():
    for case in matmul_cases.cases(16):
        matmul_cases.check(ops.matmul, ops.adapted_matmul, case)


@pytest.mark.slow
def test_many_quantized_weights():
    for case in matmul_cases.cases(240, longest=700, widest=700, seed=1):
        matmul_cases.check(ops.matmul, ops.adapted_matmul, case)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantized_weight_is_saved_as_it_is(format: str):
    """Neither what a scan keeps for the backward pass nor a gradient is a dense weight."""
    x, kernels, a, b = arrays((48, 128), (3, 128, 128), (3, 128, 4), (3, 4, 128))
    weights = quantize(kernels, format)

    def network(x: Any, a: Any, b: Any) -> Any:
        def layer(x: Any, leaves: Any) -> Any:
            w, a, b = leaves
            return jnp.tanh(ops.adapted_matmul(ops.matmul(x, w), w, a, b)), None

        return jax.lax.scan(layer, x, (weights, a, b))[0]

    _, pullback = jax.vjp(network, x, a, b)
    _, linear = jax.linearize(network, x, a, b)
    for saved in (jax.tree.leaves(pullback), jax.tree.leaves(linear)):
        large = [leaf for leaf in saved if leaf.shape[-2:] == (128, 128)]
        assert {leaf.dtype for leaf in large} <= {weights.codes.dtype}
    assert (128, 128) not in products(jax.grad(lambda x: network(x, a, b).sum()), x)


def test_gradient_of_a_quantized_weight_is_refused():
    x, kernel = arrays((2, 64), (64, 8))
    w = quantize(kernel, "int8")
    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.grad(lambda scale: ops.matmul(x, dataclasses.replace(w, scale=scale)).sum())(w.scale)
