import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxtune import ops
from tests import tolerances
from tests.oracle import difference


def random_case(seed: int, b: int, t: int, d: int, vocab: int, *, transposed: bool) -> tuple:
    random = np.random.default_rng(seed)
    x = random.normal(size=(b, t, d)).astype(np.float32)
    w = random.normal(size=(vocab, d) if transposed else (d, vocab)).astype(np.float32)
    targets = random.integers(0, vocab, (b, t)).astype(np.int32)
    weights = random.choice([0, 0.5, 1, 2.0], (b, t)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), targets, weights


def dense(x: Any, w: Any, targets: Any, weights: Any, *, transposed: bool) -> tuple:
    logits = jnp.einsum("btd,vd->btv" if transposed else "btd,dv->btv", x, w)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum(), (weights * (logits.argmax(-1) == targets)).sum()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "skipped"),
    [
        (2, 16, slice(0)),  # one chunk
        (8, 150, slice(0)),  # chunks of 64 tokens a row and a remainder
        (8, 150, slice(60, 130)),  # the second chunk has no target
        (600, 3, slice(0)),  # more rows than tokens in a chunk
    ],
)
def test_values_and_gradients_are_those_of_full_logits(
    b: int, t: int, skipped: slice, transposed: bool
):
    x, w, targets, weights = random_case(t, b, t, 8, 33, transposed=transposed)
    weights[:, skipped] = 0

    def run(function: Any) -> Any:
        def total(x: Any, w: Any) -> Any:
            loss, correct = function(x, w, targets, weights, transposed=transposed)
            return 3 * loss, (loss, correct)

        (_, sums), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, w)
        return *sums, *grads

    expected = jax.jit(run, static_argnums=0)(dense)
    got = jax.jit(run, static_argnums=0)(ops.cross_entropy)
    for name, value, right in zip(("loss", "correct", "dx", "dw"), got, expected, strict=True):
        assert difference(value, right) <= tolerances.OPS, name


def test_only_the_gradients_asked_for_are_computed():
    x, w, targets, weights = random_case(0, 2, 16, 8, 33, transposed=False)
    loss = functools.partial(ops.cross_entropy, targets=targets, weights=weights, transposed=False)

    def shapes(argnums: Any) -> set[tuple[int, ...]]:
        """Shapes of the results of all matrix products."""
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: loss(x, w)[0], argnums))(x, w)
        found = set()

        def visit(jaxpr: Any) -> None:
            for equation in jaxpr.eqns:
                if equation.primitive.name == "dot_general":
                    found.add(equation.outvars[0].aval.shape)
                for inner in jaxprs_in_params(equation.params):
                    visit(inner)

        visit(jaxpr.jaxpr)
        return found

    assert (8, 33) not in shapes(0) and (33, 8) not in shapes(0)
    assert {(8, 33), (33, 8)} & shapes((0, 1))


def test_no_array_holds_the_logits_of_all_tokens():
    x, w, targets, weights = random_case(0, 4, 1024, 8, 4099, transposed=True)

    def loss(x: Any) -> Any:
        return ops.cross_entropy(x, w, targets, weights, transposed=True)[0]

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 4099 * 4 / 2


def test_loss_without_gradient():
    x, w, targets, weights = random_case(1, 2, 30, 8, 33, transposed=True)
    got = ops.cross_entropy(x, w, targets, weights, transposed=True)
    expected = dense(x, w, targets, weights, transposed=True)
    assert difference(got[0], expected[0]) <= tolerances.OPS
    assert float(got[1]) == float(expected[1])


def test_nothing_to_learn_is_zero():
    x, w, targets, weights = random_case(2, 2, 10, 8, 33, transposed=False)

    def loss(x: Any) -> Any:
        return ops.cross_entropy(x, w, targets, 0 * weights, transposed=False)[0]

    value, gradient = jax.value_and_grad(loss)(x)
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_bfloat16_is_close():
    x, w, targets, weights = random_case(3, 2, 40, 16, 50, transposed=True)
    half = jnp.asarray(x, jnp.bfloat16)

    def total(x: Any, w: Any) -> Any:
        return ops.cross_entropy(x, w, targets, weights, transposed=True)[0]

    value, (dx, dw) = jax.value_and_grad(total, (0, 1))(half, w)
    expected, (ex, ew) = jax.value_and_grad(total, (0, 1))(x, w)
    assert value.dtype == jnp.float32 and dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert difference(value, expected) <= 5e-3
    assert difference(dx, ex) <= tolerances.OPS_BFLOAT16
    assert difference(dw, ew) <= tolerances.OPS_BFLOAT16
