"""The Pallas kernels for GPUs: values in interpret mode, lowering, and compiling without a GPU."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.attention import Mask, flash, make_operands, pallas_gpu, reference
from jaxtune.ops.attention.blocks import least_blocks, seen_blocks
from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.pallas_gpu import Tile, listed
from tests.ops.attention_cases import Attend, cases, check
from tests.tolerances import OPS, OPS_BFLOAT16


def interpreted(tile: Tile | None) -> Attend:
    passes = flash.Passes(
        functools.partial(pallas_gpu.forward, tile=tile, interpret=True),
        functools.partial(pallas_gpu.backward, tile=tile, interpret=True),
    )
    return functools.partial(flash.attend, passes)


# Rows of a few dozen tokens then have several blocks.
SMALL = interpreted(Tile(queries=32, keys=16, warps=4, stages=2))
REAL = interpreted(None)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> Iterator[None]:
    """The interpreter makes large programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("seed", range(1, 9))
def test_float32(seed: int):
    (case,) = cases(1, first=seed, longest=100)
    check(SMALL, case, OPS)


@pytest.mark.parametrize("seed", range(20, 23))
def test_bfloat16(seed: int):
    (case,) = cases(1, first=seed, dtype=jnp.bfloat16, longest=100)
    check(SMALL, case, OPS_BFLOAT16)


def test_sizes_of_real_heads():
    (case,) = cases(1, first=10, heads=(96,), longest=150)
    check(REAL, case, OPS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 300, 10))
def test_many_in_float32(first: int):
    for case in cases(10, first=first):
        check(SMALL, case, OPS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(300, 400, 10))
def test_many_in_bfloat16(first: int):
    for case in cases(10, first=first, dtype=jnp.bfloat16):
        check(SMALL, case, OPS_BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("h", [64, 80, 128, 192, 256])
def test_many_of_real_heads(h: int):
    for case in cases(6, first=400 + h, heads=(h,)):
        check(REAL, case, OPS)


def packed_row(t: int, documents: int) -> jax.Array:
    """Segment ids [1, T] of documents of uneven lengths, and padding (0) at the end."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, t), documents, replace=False))
    ids = np.searchsorted(cuts, np.arange(t), side="right") + 1
    return jnp.asarray(np.where(ids > documents, 0, ids)[None], jnp.int32)


@pytest.mark.parametrize("t", [2048, 5000])
def test_blocks_visited_are_those_with_something_to_see(t: int):
    ids = packed_row(t, 16)
    mask = Mask(query_segments=ids, key_segments=ids)
    some, every = seen_blocks(mask, 0, (t, t), (128, 64))
    least = int(least_blocks(mask, 0, (t, t), (128, 64)).sum())
    by_queries = listed(some, every)
    assert least <= int(by_queries.total.sum()) <= 1.1 * least
    by_keys = listed(some.swapaxes(1, 2), every.swapaxes(1, 2))
    assert int(by_keys.total.sum()) == int(by_queries.total.sum())
    for row, (order, partial, total) in enumerate(
        zip(*(np.asarray(x[0]) for x in by_queries), strict=True)
    ):
        whole = np.asarray(every[0, row])
        assert set(order[:total]) == set(np.flatnonzero(some[0, row]))
        assert not whole[order[:partial]].any() and whole[order[partial:total]].all()


def test_blocks_between_prefix_and_window_are_not_read():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 256, 1, 16)), jnp.float32) for _ in range(3))
    operands = make_operands(q, k, v, Mask(window=20, prefix=4), query_offset=140)
    expected, _ = reference.attend(operands)
    unseen = (jnp.arange(256) >= 16) & (jnp.arange(256) < 112)
    k, v = (jnp.where(unseen[:, None, None], jnp.nan, x) for x in (k, v))
    poisoned = dataclasses.replace(operands, k=k, v=v)
    results, pullback = jax.vjp(SMALL, poisoned)
    assert np.abs(results[0] - expected).max() <= OPS * np.abs(expected).max()
    grads = pullback(jax.tree.map(jnp.ones_like, results))[0]
    assert jnp.isfinite(grads.q).all()
    assert (grads.k[:, 16:112] == 0).all() and (grads.v[:, 16:112] == 0).all()


def test_heads_over_256_are_refused():
    q = jnp.zeros((1, 4, 1, 320))
    with pytest.raises(NotImplementedError, match="320"):
        pallas_gpu.attend(make_operands(q, q, q))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(6))
def test_lowers_for_cuda(seed: int, dtype: str):
    """Into Triton's language, without a GPU and without JAX's CUDA plugin."""
    (case,) = cases(1, first=seed, dtype=dtype, heads=(64, 80, 128, 256))

    def step(operands: Operands) -> tuple:
        results, pullback = jax.vjp(pallas_gpu.attend, operands)
        grads = pullback(results)[0]
        return *results, grads.q, grads.k, grads.v, grads.sinks

    traced = jax.jit(step).trace(case.operands)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("gpu", ["a100", "h100", "rtx4090"])
def test_compiles_for_gpus(gpu: str, head_size: int, length: int):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("jax-cuda12-plugin and jax-cuda12-pjrt are not installed")
    script = Path(__file__).with_name("compile_attention_gpu.py")
    command = [sys.executable, str(script), gpu, str(length), str(head_size), "bfloat16"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(zip(*[iter(done.stdout.split())] * 2, strict=True))
    assert found["kernels"] == "3"
    assert int(found["temp"]) < 2 * length * length  # less than one head's scores in bfloat16
