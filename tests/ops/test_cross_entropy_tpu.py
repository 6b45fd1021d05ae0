"""The TPU kernels of the loss: values in interpret mode, programs for TPUs that are not here."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import ops
from jaxtune.ops.cross_entropy import pallas_tpu
from jaxtune.sharding.mesh import make_mesh
from tests import tolerances
from tests.ops import cross_entropy_cases
from tests.oracle import difference

ROOT = Path(__file__).resolve().parents[2]
CASES = range(8)
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 220)]


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
    case = cross_entropy_cases.random_case(0)
    w = case.w[..., : case.w.shape[-1] // 4 * 4]
    vocab = w.shape[0 if case.transposed else 1]
    parts = ("tensor", "fsdp") if case.transposed else ("fsdp", "tensor")
    shardings = tuple(NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None,), parts))
    arguments = (case.x, w, case.targets % vocab, case.weights)
    options = {"transposed": case.transposed, "implementation": "pallas_tpu"}
    one = ops.cross_entropy(*arguments, **options)
    eight = ops.cross_entropy(*arguments, **options, shardings=shardings)
    for got, expected in zip(eight, one, strict=True):
        assert difference(got, expected) <= tolerances.SHARDED


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
