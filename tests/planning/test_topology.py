"""Devices that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune import hardware
from jaxtune.errors import ConfigError
from jaxtune.planning import topology

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name", ["v5e", "v4:2x2x1", "cpu:0", "h100", "b300:8", "v5e:4y4", "cpu:2x2"]
)
def test_unknown_topologies(name: str):
    with pytest.raises(ConfigError, match=f"--topology={name}: must be v5e, v5p, v6e"):
        topology.topology_devices(name)


def test_gpus_need_the_plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"h100:8 needs JAX's plugin.*jaxtune\[cuda\]"):
        topology.topology_devices("h100:8")


@pytest.mark.parametrize(
    ("name", "use"), [("h100:12", "up to 8, or a multiple of 8"), ("rtx4090:16", "up to 8$")]
)
def test_gpus_come_in_hosts(monkeypatch: pytest.MonkeyPatch, name: str, use: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=use):
        topology.topology_devices(name)


def test_every_gpu_has_a_data_sheet_and_a_target():
    for name, (kind, *_) in topology._GPUS.items():
        chip = hardware.chip(kind)
        assert chip is not None, name
        assert f"device_memory_size: {chip.memory}" in topology.gpu_target(name)


def test_a_data_sheet_is_of_the_whole_kind():
    assert hardware.chip("TPU v5 lite") != hardware.chip("TPU v5") == hardware.chip("TPU v5p")
    assert hardware.chip("NVIDIA A100-SXM4-80GB") != hardware.chip("NVIDIA A100-SXM4-40GB")
    assert hardware.chip("NVIDIA L4") != hardware.chip("NVIDIA L40S") is not None
    assert hardware.chip("NVIDIA L40") is None and hardware.chip("cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("h100:8", "NVIDIA H100 80GB HBM3"), ("rtx4090:1", "NVIDIA GeForce RTX 4090")],
)
def test_gpus_through_the_plugin(name: str, kind: str):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("jax-cuda12-plugin and jax-cuda12-pjrt are not installed")
    program = "from jaxtune.planning.topology import topology_devices as t; import sys;"
    program += "d = t(sys.argv[1]); print(len(d), d[0].device_kind)"
    command = [sys.executable, "-c", program, name]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{name.partition(':')[2]} {kind}"
