"""Memory of an optimizer's step on four TPUs, by the compiler's account."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.planning.topology import DEVICELESS

ROOT = Path(__file__).parents[2]


def compiled(*arguments: str) -> dict[str, int]:
    """In a process of its own: libtpu stays loaded."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    settings = DEVICELESS | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_tpu.py")), *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_state_in_host_memory_leaves_the_device():
    stay, away = compiled("adamw", "stay"), compiled("adamw", "offload")
    state = 2 * stay["weights"]  # float32 moments of a device's share
    assert stay["host_arguments"] == 0
    assert away["host_arguments"] == away["host_results"] >= 0.99 * state
    assert stay["arguments"] - away["arguments"] >= 0.99 * state
    # No more than the moments of two layers of 16, coming and going, are on the device.
    assert away["temporaries"] <= 4 / 16 * state
    assert away["host_temporaries"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_one_layer_at_a_time(name: str):
    plan = compiled(name, "stay")
    assert plan["temporaries"] <= 0.5 * plan["weights"]  # of all layers it would be 3 and more
    if name == "adamw8bit":
        assert plan["collectives"] == 0, "blocks lie within shards"
