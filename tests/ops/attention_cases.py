"""Random cases of attention that every implementation is tested with, and the comparison.

`cases(...)` draws shapes, dtypes, masks and extras from seeds, so that a failing case is named by
its seed. `differences(attend, case)` compares values, log-sum-exp and all gradients with the
float32 reference, which JAX differentiates. Implementations are functions from operands to
(y, lse) as in `ops.attention.flash`; a kernel is tested in interpret mode as

    functools.partial(flash.attend, flash.Passes(
        functools.partial(kernel.forward, interpret=True),
        functools.partial(kernel.backward, interpret=True)))
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.ops.attention import Columns, Mask, make_operands, reference
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import MASKED

Attend = Callable[[Operands], tuple[jax.Array, jax.Array | None]]

FEATURES = (
    "noncausal",
    "window",
    "prefix",
    "segments",
    "columns",
    "offset",
    "traced_offset",
    "lengths",
    "softcap",
    "sinks",
    "alibi",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and the cotangents of its two results.

    Attributes:
        seed: names the case.
        features: names of `FEATURES` that it has.
        operands: what the implementation is called with; query_offset is an int.
        dy, dlse: cotangents, float32 [B, T, N, H] and [B, T, N].
    """

    seed: int
    features: frozenset[str]
    operands: Operands
    dy: np.ndarray
    dlse: np.ndarray

    def __str__(self) -> str:
        b, t, n, h = self.operands.q.shape
        s, k = self.operands.k.shape[1:3]
        shape = f"B{b} T{t} S{s} N{n} K{k} H{h} {self.operands.q.dtype}"
        return f"seed {self.seed}: {shape} {' '.join(sorted(self.features))}"


def cases(
    count: int,
    *,
    dtype: Any = jnp.float32,
    heads: tuple[int, ...] = (8, 16, 24),
    longest: int = 300,
    without: frozenset[str] | set[str] = frozenset(),
    first: int = 0,
) -> Iterator[Case]:
    """Yields `count` cases of consecutive seeds.

    Args:
        count: how many.
        dtype: of q, k and v.
        heads: head sizes to draw from: small ones are quick, real ones are 64 to 256.
        longest: no row is longer than this; few lengths are multiples of anything.
        without: features that no case has, for an implementation that refuses them.
        first: the first seed.
    """
    for seed in range(first, first + count):
        yield _case(seed, jnp.dtype(dtype), heads, longest, frozenset(without))


def _case(
    seed: int, dtype: jnp.dtype, heads: tuple[int, ...], longest: int, without: frozenset[str]
) -> Case:
    random = np.random.default_rng(seed)
    likely = {"noncausal": 0.25, "segments": 0.5, "offset": 0.4, "traced_offset": 0.15}
    drawn = {name for name in FEATURES if random.random() < likely.get(name, 0.3)}
    features = drawn - without
    b = int(random.integers(1, 3))
    lengths = [1, int(random.integers(2, 64)), int(random.integers(64, longest + 1))]
    t = int(random.choice(lengths, p=[0.1, 0.3, 0.6]))
    s = int(random.integers(1, longest + 1)) if "lengths" in features else t
    prefix = int(random.integers(1, min(9, s) + 1)) if "prefix" in features else 0
    n, k = [(1, 1), (2, 2), (4, 2), (6, 2), (4, 1), (8, 1)][random.integers(6)]
    h = int(random.choice(heads))
    offset = 0
    if "offset" in features or "traced_offset" in features:
        # Negative: keys later than all queries, as when shards of a row travel around a ring.
        offset = int(random.integers(-t // 4, max(s - prefix - t, 8) + t // 4))
    mask = Mask(
        causal="noncausal" not in features,
        window=int(random.integers(3, 100)) if "window" in features else None,
        prefix=prefix,
    )
    if "segments" in features:
        ids = _segments(random, b, s, prefix)
        mask = dataclasses.replace(
            mask,
            key_segments=jnp.asarray(ids),
            query_segments=jnp.asarray(_of_queries(random, ids, t, offset + prefix)),
        )
    if "columns" in features:
        mask = dataclasses.replace(mask, columns=_columns(random, (b, s), offset, t))

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    operands = make_operands(
        jnp.asarray(normal(b, t, n, h), dtype),
        jnp.asarray(normal(b, s, k, h), dtype),
        jnp.asarray(normal(b, s, k, h), dtype),
        mask,
        scale=None if random.random() < 0.6 else float(random.uniform(0.2, 2)) / h**0.5,
        softcap=float(random.uniform(1, 30)) if "softcap" in features else None,
        sinks=jnp.asarray(normal(n)) if "sinks" in features else None,
        alibi=_slopes(random, n, max(t, s)) if "alibi" in features else None,
        query_offset=offset,
    )
    return Case(seed, frozenset(features), operands, normal(b, t, n, h), normal(b, t, n))


def _slopes(random: np.random.Generator, n: int, extent: int) -> jax.Array:
    """Slopes [N] of biases up to about 16: in float32 a score of 256 is only known to 1.5e-5.

    With biases of 190 the reference itself is up to 5.2e-6 from its float64 self (XLA's 4.8e-6).
    """
    return jnp.asarray(random.uniform(0.5, 16, n) / extent, jnp.float32)


def _segments(random: np.random.Generator, b: int, s: int, prefix: int) -> np.ndarray:
    """Ids [B, S] of packed examples, some padding (0) at the end; sometimes in no order at all."""
    ids = np.zeros((b, s), np.int32)
    for row in ids:
        cuts = np.sort(random.integers(1, s + 1, size=random.integers(1, 9)))
        for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
            row[start:end] = number
        if random.random() < 0.1:
            random.shuffle(row)
        row[:prefix] = random.integers(0, 99)  # ignored
    return ids


def _of_queries(random: np.random.Generator, ids: np.ndarray, t: int, first: int) -> np.ndarray:
    """Ids [B, T] of the queries, that of the key at the same position where there is one."""
    at = first + np.arange(t)
    inside = (at >= 0) & (at < ids.shape[1])
    others = random.integers(0, 9, size=(ids.shape[0], t))
    return np.where(inside, ids[:, np.clip(at, 0, ids.shape[1] - 1)], others).astype(np.int32)


def _columns(random: np.random.Generator, shape: tuple[int, int], offset: int, t: int) -> Columns:
    """Intervals [B, S] around the positions of the queries, each array there or not."""

    def points(ordered: bool) -> np.ndarray:
        at = random.integers(offset - 2, offset + t + 3, size=shape)
        return np.sort(at, axis=1) if ordered else at

    lts = lte = uts = ute = None
    if random.random() < 0.8:
        lts = points(random.random() < 0.7)
        lte = lts + random.integers(0, t + 1, size=shape) if random.random() < 0.5 else None
    if random.random() < 0.5:
        ute = points(random.random() < 0.7) - t // 2
        uts = ute - random.integers(0, t + 1, size=shape) if random.random() < 0.5 else None
    return Columns(
        *(None if x is None else jnp.asarray(x, jnp.int32) for x in (lts, lte, uts, ute))
    )


def results(
    attend: Attend, case: Case, *, exact: bool = False, lse: bool = True
) -> dict[str, np.ndarray]:
    """y, lse, dq, dk, dv and, with sinks, dsinks of a case, in float32.

    Args:
        attend: an implementation.
        case: the case.
        exact: q, k and v become float32 first.
        lse: False: the log-sum-exp is left out, and so is its share of the gradients.
    """
    operands = case.operands
    traced = "traced_offset" in case.features
    inputs = {name: getattr(operands, name) for name in ("q", "k", "v")}
    dy = jnp.asarray(case.dy, operands.q.dtype)
    if exact:
        dy = dy.astype(jnp.float32)
        inputs = {name: array.astype(jnp.float32) for name, array in inputs.items()}
    if operands.sinks is not None:
        inputs["sinks"] = operands.sinks

    def run(
        inputs: dict[str, jax.Array], offset: jax.Array, rest: Operands
    ) -> dict[str, jax.Array]:
        rest = dataclasses.replace(rest, query_offset=offset) if traced else rest

        def call(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            y, sums = attend(dataclasses.replace(rest, **inputs))
            return {"y": y, "lse": sums} if lse and sums is not None else {"y": y}

        found, pullback = jax.vjp(call, inputs)
        cotangents = {"y": dy, "lse": jnp.asarray(case.dlse)}
        (grads,) = pullback({name: cotangents[name] for name in found})
        return found | {f"d{name}": array for name, array in grads.items()}

    arguments = inputs, jnp.int32(operands.query_offset), operands
    # Half the time of a case is compilation; without optimising, half of that.
    compiled = jax.jit(run).lower(*arguments).compile({"xla_backend_optimization_level": "0"})
    found = compiled(*arguments)
    return {name: np.asarray(array.astype(jnp.float32)) for name, array in found.items()}


def differences(attend: Attend, case: Case) -> dict[str, float]:
    """Name of result -> max |a - b| / max |b|, where b is the float32 reference's.

    The denominator is at least 0.01, and for dq and dk a quarter of what cancels in them: where a
    query sees one key only, the gradient of its scores is a difference of equal numbers, and what
    is left of it is rounding (seed 201: 8.5 - 8.5 leaves 0.045). The gradient of a sink is
    a sum over all queries that nearly cancels (seed 1029: terms of 35.7 in all leave 0.07, of which
    the reference itself misses 3.1e-5 in float64); it is compared with the sum of magnitudes.

    Raises:
        AssertionError: a number is not finite, or a query sees nothing by one of them only.
    """
    found = results(attend, case)
    expected = results(reference.attend, case, exact=True, lse="lse" in found)
    errors = {}
    for name, array in found.items():
        oracle = expected[name]
        assert array.shape == oracle.shape, f"{case}: {name} {array.shape} {oracle.shape}"
        assert np.isfinite(array).all(), f"{case}: {name} is not finite"
        if name == "lse":
            blind = oracle <= MASKED / 2
            assert (blind == (array <= MASKED / 2)).all(), f"{case}: queries that see nothing"
            array, oracle = np.where(blind, 0, array), np.where(blind, 0, oracle)
        scale = np.abs(oracle).max()
        if name == "dsinks":
            scale = _sink_terms(case, expected)
        elif name in ("dq", "dk"):
            scale = max(scale, 0.25 * _score_term(case, expected))
        errors[name] = float(np.abs(array - oracle).max() / max(scale, 1e-2))
    return errors


def _score_term(case: Case, expected: dict[str, np.ndarray]) -> float:
    """Largest magnitude of one side of the difference in a score's gradient, seen by q or k."""
    delta = np.abs((case.dy * expected["y"]).sum(axis=-1)).max()
    q, k = (np.abs(np.asarray(x, np.float32)).max() for x in (case.operands.q, case.operands.k))
    return float(delta * case.operands.scale * min(q, k))


def _sink_terms(case: Case, expected: dict[str, np.ndarray]) -> float:
    """Largest sum of magnitudes of what a sink's gradient is made of."""
    delta = (case.dy * expected["y"]).sum(axis=-1)
    if "lse" not in expected:  # compared without it, see `results`
        return float(np.abs(delta).sum(axis=(0, 1)).max())
    delta -= case.dlse
    shares = np.exp(np.asarray(case.operands.sinks) - expected["lse"])
    return float(np.abs(shares * delta).sum(axis=(0, 1)).max())


def check(attend: Attend, case: Case, tolerance: float) -> dict[str, float]:
    """`differences`, all of which must be within the tolerance.

    Raises:
        AssertionError: one is not; the message names the case.
    """
    errors = differences(attend, case)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{case}: {wrong} > {tolerance}"
    return errors
