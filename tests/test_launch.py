"""The scripts in launch/: their syntax, and what they do with stand-ins for the tools."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shell_syntax(path: Path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o111, "executable"


def tool(folder: Path, name: str, code: int = 0) -> None:
    """A program that notes how it was called."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {folder}/calls\nexit {code}\n')
    path.chmod(0o755)


def run(script: str, folder: Path, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    done = subprocess.run([str(LAUNCH / script), *arguments], env=env, capture_output=True)
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_tpu_pod_runs_the_command_on_all_workers(tmp_path: Path):
    tool(tmp_path, "gcloud")
    code, call = run("tpu_pod.sh", tmp_path, "--config=a b.py", "--x=1", TPU="slice", ZONE="west")
    assert code == 0 and call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert call[6:8] == ["--zone=west", "--worker=all"]
    command = "exec .venv/bin/python -m jaxtune.train --config=a\\ b.py --x=1"
    assert call[8] == f"--command=cd jaxtune && {command}"


def test_tpu_pod_needs_a_name(tmp_path: Path):
    tool(tmp_path, "gcloud")
    code, call = run("tpu_pod.sh", tmp_path, TPU="", ZONE="west")
    assert code != 0 and not call


def test_xpk_restarts_what_can_be_resumed(tmp_path: Path):
    tool(tmp_path, "xpk")
    named = {"CLUSTER": "c", "NAME": "first", "DEVICES": "v5litepod-16", "IMAGE": "me/jaxtune"}
    code, call = run("xpk.sh", tmp_path, "--config=a b.py", **named)
    assert code == 0 and call[:3] == ["xpk", "workload", "create"]
    assert "--device-type=v5litepod-16" in call and "--restart-on-exit-codes=70,71,75" in call
    assert call[-1] == "--command=python -m jaxtune.train --config=a\\ b.py"
    code, again = run("xpk.sh", tmp_path, **named | {"IMAGE": ""})
    assert code != 0 and again == call


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (3, False), (75, True)])
def test_slurm_job_goes_back_to_the_queue_after_a_saved_stop(
    tmp_path: Path, code: int, requeued: bool
):
    tool(tmp_path, "srun", code)
    tool(tmp_path, "scontrol")
    ended, calls = run("slurm.sh", tmp_path, "--config=a.py", SLURM_JOB_ID="77")
    assert ended == code
    assert calls[-1] == "--config=a.py" or calls[-3:] == ["scontrol", "requeue", "77"]
    assert ("scontrol" in calls) is requeued
    assert ".venv/bin/python" in calls and "jaxtune.train" in calls


def test_jobset_numbers_agree():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    hosts = int(variables["JAX_NUM_PROCESSES"])
    assert hosts == spec["parallelism"] == spec["completions"]
    name = jobset["metadata"]["name"]
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}:8476"
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert across * down == hosts * container["resources"]["limits"]["google.com/tpu"]
    assert spec["completionMode"] == "Indexed"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_skypilot_gives_each_node_its_place(tmp_path: Path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nenv\necho arguments: $@\n")
    python.chmod(0o755)
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    sky |= {"SKYPILOT_NODE_RANK": "1", "ARGUMENTS": "--config=a.py --x=1"}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | sky, capture_output=True
    )
    lines = done.stdout.decode().splitlines()
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476" in lines
    assert "JAX_NUM_PROCESSES=2" in lines and "JAX_PROCESS_ID=1" in lines
    assert lines[-1] == "arguments: -m jaxtune.train --config=a.py --x=1"
