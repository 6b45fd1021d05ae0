"""The TPU kernels of the loss: values in interpret mode, programs for TPUs that are not here."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import ops
from jaxtune.ops.cross_entropy import pallas_tpu
from jaxtune.sharding.mesh import make_mesh
from tests import tolerances
from tests.ops import cross_entropy_cases
from tests.oracle import difference

ROOT = Path(__file__).resolve().parents[2]
CASES = range(6)
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 220)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels as XLA, in small blocks: several of them, and a partial one."""
    run = functools.partial(pallas_tpu.run, interpret=True)
    monkeypatch.setattr(pallas_tpu, "run", run)
    monkeypatch.setattr(pallas_tpu, "BLOCKS", ((32, 256),))
    monkeypatch.setattr(pallas_tpu, "SLICE", 128)


@pytest.mark.parametrize("seed", [*CASES, *SLOW])
def test_random_cases(seed: int):
    case = cross_entropy_cases.random_case(seed)
    limit = tolerances.OPS if case.dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    for name, value in cross_entropy_cases.differences(case, "pallas_tpu").items():
        if name != "correct" or case.dtype == jnp.float32:  # near ties change in bfloat16
            assert value <= limit, (name, value)


def test_logprobs_of_tokens():
    case = dataclasses.replace(cross_entropy_cases.random_case(1), dtype=jnp.float32)
    for name, value in cross_entropy_cases.logprob_differences(case, "pallas_tpu").items():
        assert value <= tolerances.OPS, (name, value)


def test_vocabulary_over_devices():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 9, 16)), jnp.float32)
    w = jnp.asarray(random.normal(0, 0.5, (16, 600)), jnp.float32)
    targets, weights = random.integers(0, 600, (4, 9)), jnp.ones((4, 9)).at[1, 2:].set(0)

    def loss(x: Any, w: Any, shardings: Any) -> Any:
        given = {"transposed": False, "implementation": "pallas_tpu", "shardings": shardings}
        return ops.cross_entropy(x, w, jnp.asarray(targets, jnp.int32), weights, **given)[0]

    specs = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp", "tensor")
    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    one, eight = run(x, w, None), run(x, w, tuple(NamedSharding(mesh, spec) for spec in specs))
    for got, expected in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        assert difference(got, expected) <= tolerances.SHARDED


def test_nothing_to_learn_is_zero():
    case = cross_entropy_cases.random_case(2)
    zero = dataclasses.replace(case, weights=0 * case.weights, dtype=jnp.float32)
    assert set(cross_entropy_cases.differences(zero, "pallas_tpu").values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_compiles_for_every_chip_with_little_memory(chip: str):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install jax[tpu]")
    program = ROOT / "tools" / "bench" / "cross_entropy.py"
    result = subprocess.run(
        [sys.executable, program, chip],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    temp = {(r["weight"], r["gradients"], r["implementation"]): r["temp_mib"] for r in rows}
    kernels = [key for key in temp if key[2] == "pallas_tpu"]
    assert len(kernels) == 4
    for key in kernels:
        assert temp[key] <= 0.05 * temp[*key[:2], "full"], key
