"""Random products with quantized weights, the same for every implementation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant import NestedScale, QArray, dequantize
from jaxtune.quant.qarray import NESTED_BLOCK
from tests import tolerances
from tests.oracle import difference

FORMATS = ("int8", "int4", "nf4", "fp4")


@dataclass(frozen=True)
class Case:
    """One product and its cotangent.

    Attributes:
        x: [..., D].
        w: [D, F].
        adapter: a [D, R] and b [R, F] in float32, or None.
        dy: [..., F].
        label: what was drawn.
    """

    x: jax.Array
    w: QArray
    adapter: tuple[jax.Array, jax.Array] | None
    dy: jax.Array
    label: str


def cases(count: int, *, longest: int = 96, widest: int = 384, seed: int = 0) -> Iterator[Case]:
    """Every format, dtype and layout in turn, at random sizes.

    Args:
        count: how many.
        longest: most rows of x.
        widest: most rows and columns of W.
        seed: of the generator.
    """
    random = np.random.default_rng(seed)
    for index in range(count):
        yield _case(random, index, longest, widest)


def _case(random: np.random.Generator, index: int, longest: int, widest: int) -> Case:
    format = FORMATS[index % len(FORMATS)]
    dtype = (jnp.float32, jnp.bfloat16)[index // len(FORMATS) % 2]
    group = int(random.choice([32, 64, 128]))
    d = math.lcm(64, group) * int(random.integers(1, widest // 128 + 1))
    if format == "int8" and random.random() < 0.5:  # a scale for each column, any size
        d = group = int(random.integers(1, widest + 1))
    f, rank = int(random.integers(1, widest + 1)), int(random.integers(0, 9))
    rows = int(random.integers(1, longest + 1))
    batch = (rows,) if random.random() < 0.5 else (2, (rows + 1) // 2)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.asarray(random.integers(low, high, shape), dtype)

    groups = (d // group, f)
    nested = format in ("nf4", "fp4") and random.random() < 0.5
    scale: Any = jnp.asarray(random.uniform(0.01, 0.1, groups), jnp.float32)
    if nested:
        absmax = random.uniform(0.01, 0.1, math.ceil(math.prod(groups) / NESTED_BLOCK))
        scale = NestedScale(
            integers(0, 256, groups, jnp.uint8), jnp.asarray(absmax, jnp.float32), jnp.float32(0.05)
        )
    packed = format != "int8"
    w = QArray(
        integers(0, 256, (d // 2, f), jnp.uint8)
        if packed
        else integers(-127, 128, (d, f), jnp.int8),
        scale,
        zero=integers(0, 16, groups, jnp.float32) if format == "int4" and index % 2 else None,
        order=jnp.asarray(random.permutation(d), jnp.int32) if random.random() < 0.25 else None,
        format=format,
    )
    adapter = (normal(d, rank), normal(rank, f)) if rank else None
    label = (
        f"{index}: {format} {dtype.__name__} x {(*batch, d)} W {(d, f)} group {group} rank {rank}"
    )
    label += f" nested {nested} zero {w.zero is not None} order {w.order is not None}"
    return Case(normal(*batch, d).astype(dtype), w, adapter, normal(*batch, f).astype(dtype), label)


def check(matmul: Callable[..., Any], adapted: Callable[..., Any], case: Case) -> None:
    """Value and gradients against plain float32 products with the dequantized weight."""
    adapter = case.adapter or ()
    learned = (case.x, *adapter)

    @jax.jit
    def run(learned: Any, w: QArray, dy: jax.Array) -> Any:
        def product(x: jax.Array, *pair: jax.Array) -> jax.Array:
            return adapted(x, w, *pair) if pair else matmul(x, w)

        y, pullback = jax.vjp(product, *learned)
        return (y, *pullback(dy)), dequantize(w, jnp.float32)

    got, dense = run(learned, case.w, case.dy)
    x, dy, dense = (np.asarray(array, np.float64) for array in (case.x, case.dy, dense))
    none = np.zeros((len(dense), 0)), np.zeros((0, dense.shape[1]))
    a, b = (np.asarray(array, np.float64) for array in adapter or none)
    merged = dense + a @ b
    rows, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    right = (x @ merged, dy @ merged.T, rows.T @ (dys @ b.T), (rows @ a).T @ dys)
    bound = tolerances.OPS if case.x.dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    assert [array.dtype for array in got] == [case.x.dtype] * 2 + [jnp.float32] * len(adapter)
    for name, array, exact in zip(("y", "dx", "da", "db"), got, right, strict=False):
        assert difference(array, exact) <= bound, f"{name} of {case.label}"
