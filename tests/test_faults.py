"""Planned failures happen only where, when and if they are planned."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.faults import fault


@pytest.fixture
def plan(monkeypatch):
    def set_plan(text: str, test: str = "1") -> None:
        monkeypatch.setenv("JAXTUNE_TEST", test)
        monkeypatch.setenv("JAXTUNE_FAULT", text)

    return set_plan


def test_no_plan_no_fault(plan, monkeypatch) -> None:
    assert not fault("save_bg", 3)
    plan("save_bg=raise", test="0")
    assert not fault("save_bg", 3)
    monkeypatch.delenv("JAXTUNE_TEST")
    assert not fault("save_bg", 3)


def test_point_and_step_select(plan) -> None:
    plan("step_pre@3=raise")
    assert not fault("step_pre", 2)
    assert not fault("step_post", 3)
    assert not fault("step_pre")
    with pytest.raises(RuntimeError, match="planned fault at step_pre@3: raise"):
        fault("step_pre", 3)
    plan("step_pre=raise")
    with pytest.raises(RuntimeError):
        fault("step_pre", 9)


def test_actions(plan) -> None:
    plan("eval=nan")
    assert fault("eval")
    plan("eval=enospc")
    with pytest.raises(OSError) as raised:
        fault("eval")
    assert raised.value.errno == errno.ENOSPC
    plan("eval")
    with pytest.raises(RuntimeError, match="no action"):
        fault("eval")


@pytest.mark.parametrize("action", ("kill", "hang"))
def test_endings(action: str) -> None:
    root = Path(__file__).parents[1]
    plan = {"JAXTUNE_TEST": "1", "JAXTUNE_FAULT": f"exit={action}", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", "from jaxtune.faults import fault; fault('exit')"]
    with subprocess.Popen(command, env={**os.environ, **plan}) as process:
        if action == "kill":
            assert process.wait(timeout=30) == -signal.SIGKILL
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            process.kill()
