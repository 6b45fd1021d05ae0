"""Training in several real processes: the same numbers as in one, and the same end for all."""

import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import distributed
from jaxtune.distributed import held_rows
from tests.processes import Runs
from tests.tolerances import SHARDED


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a run of one process with two devices in "one"."""
    runs = Runs(tmp_path_factory.mktemp("distributed"))
    runs.one("one", devices=2)
    assert runs.steps("one") == [3, 6]
    return runs


def test_sigterm_to_one_saves_on_all_and_one_process_goes_on(runs: Runs) -> None:
    launch = runs.many("stopped", "--config.train.num_steps=3000", processes=2)
    launch.until("train step 2/")
    launch.signal(1, signal.SIGTERM)
    output = launch.wait(75)
    (step,) = {line.partition("after step ")[2] for line in launch.lines if "after step" in line}
    number = int(step.partition(",")[0])
    assert output.count(f"stopped after step {number}, state saved") == 2
    assert runs.steps("stopped")[-1] == number
    assert "[0] jaxtune: error: process 0: stopped" in output
    assert "Traceback" not in output
    assert not [line for line in launch.lines if line.startswith("[1] train step")]
    runs.one("stopped", f"--config.train.num_steps={max(6, number + 1)}", devices=2)
    got = np.array(runs.losses("stopped")[:6])
    assert got == pytest.approx(np.array(runs.losses("one")), rel=SHARDED)


def test_two_processes_go_on_exactly_from_one(runs: Runs) -> None:
    shutil.copytree(runs.folder / "one", runs.folder / "continued")
    launch = runs.many("continued", "--config.checkpoint.resume=3", processes=2)
    assert "resuming after step 3" in launch.wait(0)
    runs.assert_same("continued", "one")


def test_killed_process_is_named_and_ends_all(runs: Runs) -> None:
    launch = runs.many("killed", "--config.train.num_steps=3000", processes=2)
    launch.until("train step 2/")
    launch.signal(1, signal.SIGKILL)
    killed_at = time.monotonic()
    output = launch.wait(128 + signal.SIGKILL)
    assert time.monotonic() - killed_at < 20
    (line,) = [line for line in launch.lines if "error: process 0: process 1 has ended" in line]
    assert "no sign of life" in line and "the same command" in line
    assert f"-m jaxtune.train --config={runs.config}" in line
    assert "launch: process 1 was ended by SIGKILL" in output and "Traceback" not in output


def test_other_config_is_refused_by_name(runs: Runs) -> None:
    processes = separate(runs, "other", ["--config.train.seed=0", "--config.train.seed=7"])
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, out + err
        assert "1 of 2 processes differ from process 0" in err
        assert "process 1 has config.train.seed=7, process 0 0" in err and "Traceback" not in err
    assert not (runs.folder / "other" / "config.json").exists()


def separate(runs: Runs, run: str, options: list[str], **variables: str) -> list[subprocess.Popen]:
    """Processes started by hand, each with an option of its own; variables are for the last one."""
    port = 20000 + hash((str(runs.folder), run)) % 20000
    started = []
    for number, option in enumerate(options):
        command = [sys.executable, "-m", "jaxtune.train", *runs.arguments(run, option)]
        command += [f"--config.distributed.coordinator_address=127.0.0.1:{port}"]
        command += [f"--config.distributed.num_processes={len(options)}"]
        command += [f"--config.distributed.process_id={number}"]
        env = runs.environment() | (variables if number == len(options) - 1 else {})
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
    return started


class Sharding:
    """What `held_rows` asks of a sharding, in a process that holds some of its devices."""

    def __init__(self, mesh: Mesh, devices: list):
        self._whole, self._devices = NamedSharding(mesh, PartitionSpec("data")), devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        indices = self._whole.devices_indices_map(shape)
        return {device: indices[device] for device in self._devices}


def test_rows_of_processes_follow_their_devices():
    devices = jax.devices()[:6]
    mesh = Mesh(np.array(devices).reshape(3, 2), ("data", "tensor"))

    def held(of_process: list, rows: int) -> tuple[int, ...]:
        sharding: Any = Sharding(mesh, of_process)
        return held_rows(sharding, rows)

    assert held(devices, 6) == (0, 1, 2, 3, 4, 5)
    # The middle shard lies half on each of two processes.
    assert held(devices[:3], 6) == (0, 1, 2, 3) and held(devices[3:], 6) == (2, 3, 4, 5)
    assert held([devices[0], devices[5]], 6) == (0, 1, 4, 5)


class Client(dict):
    """A coordination service in which every process gives what this one does."""

    def key_value_set(self, key: str, value: str) -> None:
        self.update({key: value, key.removesuffix("0") + "1": value})

    def key_value_delete(self, folder: str) -> None:
        for key in [key for key in self if key.startswith(f"{folder}/")]:
            del self[key]

    def key_value_dir_get(self, folder: str) -> list:
        return [(key, value) for key, value in self.items() if key.startswith(f"{folder}/")]

    def blocking_key_value_get(self, key: str, _: int) -> str:
        return self[key]

    key_value_try_get = dict.__getitem__

    def wait_at_barrier(self, _name: str, _milliseconds: int) -> None:
        pass


def test_nothing_stays_of_what_processes_agree_on(monkeypatch: pytest.MonkeyPatch):
    client = Client()
    monkeypatch.setattr(distributed, "client", lambda: client)
    monkeypatch.setattr(distributed.process, "count", lambda: 2)
    assert distributed.exchange("mine") == ["mine", "mine"]
    distributed.check_same({"seed": "0"})
    assert not client


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 2), (3, 1)])
def test_state_is_the_same_on_other_devices(runs: Runs, processes: int, devices: int) -> None:
    """A finished run is read and exported again; nothing is trained in between."""
    run = f"on-{processes}-{devices}"
    shutil.copytree(runs.folder / "one", runs.folder / run)
    shutil.rmtree(runs.folder / run / "adapter")
    output = runs.many(run, processes=processes, devices=devices).wait(0)
    assert "already at step 6 of 6" in output
    runs.assert_same(run, "one")


@pytest.mark.slow
def test_whole_run_in_two_processes(runs: Runs) -> None:
    runs.many("two", "--config.checkpoint.export_merged=true", processes=2).wait(0)
    runs.assert_same("two", "one")
    assert runs.exported("two", "merged")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["data=2 fsdp=2", "fsdp=2 tensor=2", "tensor=4", "fsdp=2 sequence=2", "stage=3"]
)
def test_a_mesh_across_processes(runs: Runs, mesh: str) -> None:
    sizes = {"data": 1, "fsdp": 1} | dict(part.split("=") for part in mesh.split())
    count = math.prod(map(int, sizes.values()))
    options = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    options.append(f"--config.train.micro_batch_size={6 if 'stage' in sizes else 2}")
    name = mesh.replace(" ", "-")
    runs.one(f"one-{name}", *options, devices=count)
    runs.many(f"many-{name}", *options, processes=count).wait(0)
    got, expected = runs.losses(f"many-{name}"), runs.losses(f"one-{name}")
    assert np.array(got) == pytest.approx(np.array(expected), rel=SHARDED)


@pytest.mark.slow
def test_all_processes_compile_the_same_program_and_find_it_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's cache key is the program, the compiler's options, and the devices.

    XLA names the devices of CPU processes differently in each, so there only the first one, which
    writes the cache, finds it; the rest of the key is ours and must be alike.
    """
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler,jax._src.cache_key")
    option = f"--config.train.compilation_cache={runs.folder / 'shared_cache'}"
    output = runs.many("first", option, processes=2).wait(0)
    marker = "hash of serialized computation: "
    programs = [set(re.findall(rf"\[{n}\].*{marker}(\w+)", output)) for n in (0, 1)]
    assert programs[0] == programs[1] and len(programs[0]) > 1
    output = runs.many("second", option, processes=2).wait(0)
    assert re.search(r"\[0\].* cache hit for 'jit_train_step'", output)


@pytest.mark.slow
def test_full_fine_tuning_with_held_out_answers_and_several_devices(runs: Runs) -> None:
    options = [
        "--config.peft.method=full",
        "--config.peft.rank=16",
        "--config.data.eval_fraction=0.1",
    ]
    options += ["--config.eval.exact_match=true", "--config.eval.max_new_tokens=4"]
    options += ["--config.data.packing=false", "--config.data.pad_to=longest"]
    runs.one("one-full", *options, devices=4)
    runs.many("two-full", *options, processes=2, devices=2).wait(0)
    assert np.array(runs.losses("two-full")) == pytest.approx(
        np.array(runs.losses("one-full")), rel=SHARDED
    )
    got, expected = runs.exported("two-full", "merged"), runs.exported("one-full", "merged")
    for name in expected:
        largest = np.abs(expected[name]).max()
        assert np.abs(got[name] - expected[name]).max() <= SHARDED * largest, name
    files = [runs.folder / run / "samples.jsonl" for run in ("one-full", "two-full")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_killed_process_with_the_defaults(runs: Runs, victim: int) -> None:
    run = f"killed-{victim}"
    options = ["--config.train.num_steps=3000", "--config.distributed.silence_seconds=10"]
    launch = runs.many(run, *options, processes=3)
    launch.until("train step 4/")
    launch.signal(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    output = launch.wait(128 + signal.SIGKILL)
    assert time.monotonic() - killed_at < 20
    for number in {0, 1, 2} - {victim}:
        assert f"error: process {number}: process {victim} " in output
    runs.many(run, "--config.train.num_steps=6", processes=2).wait(0)
    assert runs.losses(run)[-1][0] == 6


@pytest.mark.slow
def test_hanging_process_ends_all_with_stacks(runs: Runs) -> None:
    options = ["--config.distributed.step_timeout_seconds=5"] * 2
    first, hanging = separate(runs, "hanging", options, JAXTUNE_FAULT="step_post@3=hang")
    _, err = hanging.communicate(timeout=120)
    assert hanging.returncode == 70, err
    assert "error: process 1: step 3 took longer than distributed.step_timeout_seconds=5" in err
    assert "where every thread is" in err and "faults.py" in err and "train.py" in err
    _, err = first.communicate(timeout=120)
    # 71 where the loss of the other breaks its collective before its own time is up, as on CPU.
    assert first.returncode in (70, 71), err
    assert "took longer than distributed.step_timeout_seconds=5" in err


@pytest.mark.slow
def test_error_of_one_process_is_told_to_all(runs: Runs, tmp_path: Path) -> None:
    absent = f"--config.data.train={tmp_path / 'absent.jsonl'}"
    first, second = separate(runs, "absent", ["--config.train.seed=0", absent])
    _, err = second.communicate(timeout=120)
    assert second.returncode == 3 and "absent.jsonl does not exist" in err
    _, err = first.communicate(timeout=120)
    assert first.returncode == 71
    assert "process 0: process 1 has ended (DataError:" in err and "absent.jsonl" in err


@pytest.mark.slow
def test_other_data_under_the_same_name_are_refused(runs: Runs, tmp_path: Path) -> None:
    lines = (runs.folder / "data.jsonl").read_text().splitlines(keepends=True)
    for home, rows in (("first", lines), ("second", lines[:-1])):
        (tmp_path / home).mkdir()
        (tmp_path / home / "rows.jsonl").write_text("".join(rows))
    named = ["--config.data.train=~/rows.jsonl"] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "first"))
        processes = separate(runs, "other-data", named, HOME=str(tmp_path / "second"))
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in err
        (found,) = re.findall(r"process 1 has training data=(\w{64}), process 0 (\w{64})", err)
        assert found[0] != found[1]


@pytest.mark.slow
def test_a_stream_in_two_processes(runs: Runs) -> None:
    stream = "--config.data.streaming=true"
    runs.one("one-stream", stream, devices=2)
    runs.many("two-stream", stream, processes=2).wait(0)
    runs.assert_same("two-stream", "one-stream")
    output = runs.many("two-stream", stream, "--config.checkpoint.resume=3", processes=2).wait(0)
    assert "resuming after step 3" in output
    runs.assert_same("two-stream", "one-stream")


@pytest.mark.slow
def test_interrupt_reaches_all_through_the_launcher(runs: Runs) -> None:
    launch = runs.many("interrupted", "--config.train.num_steps=3000", processes=2)
    launch.until("train step 2/")
    launch.process.send_signal(signal.SIGINT)
    output = launch.wait(130)
    assert output.count("SIGINT: saving after this step") == 2
    assert output.count("state saved - start the same command") == 2


@pytest.mark.slow
def test_folder_that_is_not_shared_is_refused(runs: Runs, tmp_path: Path) -> None:
    shared = "--config.train.output_dir=out"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    processes = []
    for number, place in enumerate("ab"):
        command = [sys.executable, "-m", "jaxtune.train", f"--config={runs.config}", shared]
        env = runs.environment() | {
            "JAX_COORDINATOR_ADDRESS": "127.0.0.1:23431",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, cwd=tmp_path / place, env=env, stdout=pipe, stderr=pipe, text=True
            )
        )
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "run.lock (on a file system that all share)=none" in err
