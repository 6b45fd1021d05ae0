"""The benchmark's cases on tiny shapes: variants of one case compute the same."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("bench_tool", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants_agree():
    found = list(load().cases("tiny", jnp.float32, "cpu"))
    assert {case.name.split("/")[0] for case in found} == {
        "attention", "matmul", "dequantize", "cross_entropy",
    }  # fmt: skip
    for case in found:
        results = [jax.tree.leaves(jax.jit(run)(*case.args)) for run in case.variants.values()]
        assert len(results) > 1, case.name
        for result in results[1:] if case.tolerance else ():
            for got, expected in zip(result, results[0], strict=True):
                scale = np.abs(expected).max()
                assert np.abs(got - expected).max() <= case.tolerance * scale, case.name


def test_measure():
    bench = load()
    (case,) = bench.cases("tiny", jnp.float32, "cpu", "cross_entropy")
    first, second = bench.measure(case, repeats=2)
    assert (first["variant"], first["ratio"]) == ("full logits", 1.0)
    assert second["ms"] > 0 and second["temp_bytes"] is not None
