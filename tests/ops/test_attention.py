from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.ops.attention import Mask
from tests import tolerances
from tests.oracle import difference


def plain(q: Any, k: Any, v: Any, segments: Any, offset: int = 0) -> np.ndarray:
    """Row by row in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, n, h = q.shape
    group = n // k.shape[2]
    y = np.zeros(q.shape)
    for i, j, head in np.ndindex(b, t, n):
        sees = np.arange(k.shape[1]) <= j + offset
        if segments[0] is not None:
            sees &= np.asarray(segments[1][i]) == segments[0][i][j]
        scores = k[i, sees, head // group] @ q[i, j, head] / np.sqrt(h)
        weights = np.exp(scores - scores.max())
        y[i, j, head] = weights / weights.sum() @ v[i, sees, head // group]
    return y


def random_case(seed: int, b: int, t: int, n: int, k: int, h: int, examples: int) -> tuple:
    """q, k, v and segment ids of up to `examples` examples a row, some padding at the end."""
    random = np.random.default_rng(seed)
    q, key, v = (random.normal(size=(b, t, m, h)).astype(np.float32) for m in (n, k, k))
    if not examples:
        return q, key, v, None
    segments = np.zeros((b, t), np.int32)
    for row in segments:
        cuts = np.sort(random.choice(np.arange(1, t + 1), min(examples, t), replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
            row[start:end] = number
    return q, key, v, segments


def packed(query_segments: Any, key_segments: Any = None) -> Mask:
    """Causal within segments; the keys' ids are the queries' if not given."""
    return Mask(
        query_segments=query_segments,
        key_segments=query_segments if key_segments is None else key_segments,
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("examples", [0, 3])
def test_values_are_those_of_the_formula(implementation: str, examples: int):
    q, k, v, segments = random_case(0, 2, 37, 6, 2, 8, examples)
    y = ops.attention(q, k, v, mask=packed(segments), implementation=implementation)
    assert difference(y, plain(q, k, v, (segments, segments))) <= tolerances.OPS


# Blocks are of 128 rows, or of a sixteenth of the row where that is longer.
@pytest.mark.parametrize(
    ("b", "t", "n", "k", "h", "examples"),
    [
        (2, 1, 4, 4, 8, 0),
        (3, 100, 4, 4, 8, 2),
        (2, 128, 6, 2, 16, 4),
        (1, 300, 6, 3, 12, 0),
        (2, 300, 4, 1, 8, 5),
        (1, 2063, 2, 1, 4, 7),
    ],
)
def test_blocks_equal_the_reference(b: int, t: int, n: int, k: int, h: int, examples: int):
    q, key, v, segments = random_case(t, b, t, n, k, h, examples)
    dy = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

    def run(implementation: str) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return ops.attention(q, k, v, mask=packed(segments), implementation=implementation)

        y, pullback = jax.vjp(attend, q, key, v)
        return y, *pullback(dy)

    expected = jax.jit(run, static_argnums=0)("reference")
    got = jax.jit(run, static_argnums=0)("xla")
    for name, array, oracle in zip(("y", "dq", "dk", "dv"), got, expected, strict=True):
        assert difference(array, oracle) <= 5 * tolerances.OPS, name


def test_bfloat16_keeps_its_dtype_and_is_close():
    q, k, v, segments = random_case(1, 2, 150, 4, 2, 8, 3)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

    def run(q: Any, k: Any, v: Any, **options: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            y = ops.attention(q, k, v, mask=packed(segments), **options)
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, expected), oracle = run(q, k, v, implementation="reference")
    (_, y), grads = run(*half, softmax_dtype=jnp.bfloat16)
    for array, right in zip((y, *grads), (expected, *oracle), strict=True):
        assert array.dtype == jnp.bfloat16
        assert difference(array, right) <= tolerances.OPS_BFLOAT16


def test_queries_after_a_cache():
    q, k, v, segments = random_case(2, 2, 20, 4, 2, 8, 2)
    whole = plain(q, k, v, (segments, segments))
    mask = packed(segments[:, 15:], segments)
    y = ops.attention(
        q[:, 15:], k, v, mask=mask, query_offset=jnp.int32(15), implementation="reference"
    )
    assert difference(y, whole[:, 15:]) <= tolerances.OPS
    with pytest.raises(NotImplementedError, match="same tokens"):
        ops.attention(q[:, 15:], k, v, mask=mask, query_offset=15, implementation="xla")


def test_large_scores_do_not_overflow():
    q, k, v, _ = random_case(3, 1, 140, 2, 2, 8, 0)
    for implementation in ("reference", "xla"):

        def total(q: Any, implementation: str = implementation) -> Any:
            return ops.attention(q, k, v, implementation=implementation).sum()

        value, gradient = jax.jit(jax.value_and_grad(total))(q * 1e4)
        assert np.isfinite(value) and np.isfinite(gradient).all()
