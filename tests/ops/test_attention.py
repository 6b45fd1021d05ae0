from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.ops.attention import Columns, Mask, attention_with_lse, make_operands, xla
from jaxtune.ops.attention.mask import MASKED
from tests import tolerances
from tests.ops import attention_cases
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


@pytest.mark.parametrize("seed", range(24))
def test_blocks_equal_the_reference(seed: int):
    for case in attention_cases.cases(1, first=seed):
        attention_cases.check(xla.attend, case, tolerances.OPS)


@pytest.mark.parametrize("seed", range(24, 32))
def test_blocks_equal_the_reference_in_bfloat16(seed: int):
    for case in attention_cases.cases(1, dtype=jnp.bfloat16, first=seed):
        attention_cases.check(xla.attend, case, tolerances.OPS_BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "count"), [((8, 16, 24), 140), ((64, 80, 128, 256), 40)], ids=["small", "real"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_random_cases_equal_the_reference(dtype: str, heads: tuple[int, ...], count: int):
    for case in attention_cases.cases(count, dtype=dtype, heads=heads, first=1000):
        long_sums = case.operands.q.shape[3] >= 256
        exact = tolerances.OPS_LONG_SUMS if long_sums else tolerances.OPS
        tolerance = exact if dtype == "float32" else tolerances.OPS_BFLOAT16
        attention_cases.check(xla.attend, case, tolerance)


def test_a_long_row_equals_the_reference():
    q, k, v, segments = random_case(4, 1, 2063, 2, 1, 4, 7)
    case = attention_cases.Case(
        seed=4,
        features=frozenset(),
        operands=make_operands(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), packed(segments)),
        dy=q[:, ::-1],
        dlse=q[..., 0],
    )
    attention_cases.check(xla.attend, case, tolerances.OPS)


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


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_queries_after_a_cache(implementation: str):
    q, k, v, segments = random_case(2, 2, 20, 4, 2, 8, 2)
    whole = plain(q, k, v, (segments, segments))
    mask = packed(segments[:, 15:], segments)
    for offset in (15, jnp.int32(15)):
        y = ops.attention(
            q[:, 15:], k, v, mask=mask, query_offset=offset, implementation=implementation
        )
        assert difference(y, whole[:, 15:]) <= tolerances.OPS


def test_large_scores_do_not_overflow():
    q, k, v, _ = random_case(3, 1, 140, 2, 2, 8, 0)
    for implementation in ("reference", "xla"):

        def total(q: Any, implementation: str = implementation) -> Any:
            return ops.attention(q, k, v, implementation=implementation).sum()

        value, gradient = jax.jit(jax.value_and_grad(total))(q * 1e4)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_nothing_gets_and_gives_nothing(implementation: str):
    q, k, v, _ = random_case(5, 1, 6, 2, 1, 4, 0)
    segments = np.array([[1, 1, 2, 1, 1, 1]], np.int32)
    mask = packed(segments, np.ones_like(segments))

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention_with_lse(q, k, v, mask=mask, implementation=implementation)

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        (y, lse), pullback = jax.vjp(call, q, k, v)
        only = jnp.zeros_like(y).at[0, 2].set(1)
        return y, lse, pullback((only, only[..., 0]))

    y, lse, gradients = run(q, k, v)
    assert (y[0, 2] == 0).all() and (lse[0, 2] == MASKED).all()
    for gradient in gradients:
        assert (gradient == 0).all()


def test_tiles_that_the_mask_empties_are_skipped():
    """A hidden key that is not a number is not even multiplied if its whole tile is skipped."""
    t = 512
    q, k, v, _ = random_case(6, 1, t, 2, 1, 8, 0)
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 128)[None]
    masks = {
        "segments": packed(ids),
        "columns": Mask(columns=Columns(lts=jnp.asarray(ids * 128))),
        "window": Mask(window=128),
    }
    k[:, :128] = np.nan
    for name, mask in masks.items():

        @jax.jit
        def run(q: Any, k: Any, v: Any, mask: Mask = mask) -> Any:
            y, pullback = jax.vjp(lambda q, k, v: ops.attention(q, k, v, mask=mask), q, k, v)
            return y, *pullback(jnp.ones_like(y).at[:, :256].set(0))

        y, _, _, dv = run(q, k, v)
        assert np.isfinite(y[:, 256:]).all() and np.isfinite(dv[:, 256:]).all(), name
        assert np.isnan(y[:, :128]).all(), name


def test_memory_grows_with_the_length_not_its_square():
    def temporary(t: int, implementation: str) -> int:
        q, k = (jax.ShapeDtypeStruct((1, t, n, 64), jnp.float32) for n in (4, 2))
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)

        def gradients(q: Any, k: Any, ids: Any) -> Any:
            def call(q: Any, k: Any, v: Any) -> Any:
                return ops.attention(q, k, v, mask=packed(ids), implementation=implementation)

            return jax.vjp(call, q, k, k)[1](q)

        analysis = jax.jit(gradients).lower(q, k, ids).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(8192, "xla") < 4.2 * temporary(2048, "xla")
    assert temporary(2048, "xla") < 0.06 * temporary(2048, "reference")


def test_a_policy_that_saves_the_name_spares_the_forward_pass():
    q, k, v, _ = random_case(7, 1, 32, 2, 2, 8, 0)

    def loops(policy: Any) -> int:
        call = jax.checkpoint(lambda q: jnp.sin(ops.attention(q, k, v)), policy=policy)
        gradient = jax.value_and_grad(lambda q: call(q).sum())
        return jax.jit(gradient).lower(jnp.asarray(q)).as_text().count("stablehlo.while")

    policies = jax.checkpoint_policies
    assert loops(policies.save_only_these_names("attention")) == 2  # forward, backward
    assert loops(policies.nothing_saveable) == 3


def test_what_does_not_fit_is_refused():
    q, k, v, segments = random_case(8, 2, 8, 4, 2, 8, 2)
    with pytest.raises(ValueError, match="do not fit"):
        ops.attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match="both queries and keys"):
        ops.attention(q, k, v, mask=Mask(query_segments=segments))
    with pytest.raises(ValueError, match="columns.lts"):
        ops.attention(q, k, v, mask=Mask(columns=Columns(lts=segments[:, 1:])))
    with pytest.raises(ValueError, match="lte needs lts"):
        ops.attention(q, k, v, mask=Mask(columns=Columns(lte=segments)))
    with pytest.raises(ValueError, match="window 0"):
        ops.attention(q, k, v, mask=Mask(window=0))
    with pytest.raises(ValueError, match="sinks"):
        ops.attention(q, k, v, sinks=jnp.zeros(2))
    with pytest.raises(ValueError, match="there are reference, xla"):
        ops.attention(q, k, v, implementation="flash")


@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_by_distance_and_its_gradient_equal_the_reference(causal: bool):
    random = np.random.default_rng(0)
    shapes = (2, 150, 4, 8), (2, 300, 2, 8), (2, 300, 2, 8), (4, 2 * 310 - 1)
    q, k, v, relative = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    dy = random.normal(size=q.shape).astype(np.float32)
    segments = (
        np.arange(150) // 70 * np.ones((2, 1), int),
        np.arange(300) // 90 * np.ones((2, 1), int),
    )
    mask = Mask(
        causal, query_segments=jnp.asarray(segments[0]), key_segments=jnp.asarray(segments[1])
    )

    def gradients(implementation: str) -> Any:
        def total(q: Any, k: Any, v: Any, relative: Any) -> Any:
            y = ops.attention(
                q, k, v, mask=mask, relative=relative, scale=1.0, implementation=implementation
            )
            return (y * dy).sum(), y

        return jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, relative)

    for got, expected in zip(
        *map(jax.tree.leaves, map(gradients, ("xla", "reference"))), strict=True
    ):
        assert difference(got, expected) <= tolerances.OPS


def test_a_bias_by_distance_that_does_not_fit_is_refused():
    q = jnp.zeros((1, 4, 2, 8))
    for wrong, mask in ((jnp.zeros((2, 6)), Mask()), (jnp.zeros((2, 5)), Mask())):
        with pytest.raises(ValueError, match="relative .* must be"):
            make_operands(q, q, q, mask, relative=wrong)
    with pytest.raises(ValueError, match="no prefix, no offset"):
        make_operands(q, q, q, relative=jnp.zeros((2, 7)), query_offset=1)
    for kernel in ("pallas_tpu", "pallas_gpu", "splash", "cudnn"):
        with pytest.raises(NotImplementedError, match="relative"):
            ops.attention(q, q, q, relative=jnp.zeros((2, 7)), implementation=kernel)
