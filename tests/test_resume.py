"""Runs that are killed, stopped, starved of disk or damaged end up where they would have anyway."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune.checkpoint import meta
from jaxtune.checkpoint.lock import RunLock
from jaxtune.checkpoint.store import Store

ROOT = Path(__file__).parents[1]
CONFIG = """
from jaxtune import config

def get_config():
    c = config.default()
    c.model.path = "tiny:llama"
    c.peft.rank = 4
    c.peft.dropout = 0.1
    c.data.train = ({data!r},)
    c.data.max_seq_len = 192
    c.optim.learning_rate = 1e-2
    c.optim.weight_decay = 0.01
    c.train.micro_batch_size = 2
    c.train.gradient_accumulation_steps = 2
    c.train.compilation_cache = {cache!r}
    c.checkpoint.every_steps = 3
    c.log.progress = "plain"
    c.log.tensorboard = False
    c.log.plot = False
    return c
"""


class Runner:
    """Starts the training command on a small packed data set; one folder for each run."""

    def __init__(self, folder: Path):
        self.folder = folder
        data, self.config = folder / "data.jsonl", folder / "config.py"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        self.config.write_text(CONFIG.format(data=str(data), cache=str(folder / "cache")))

    def start(self, run: str, num_steps: int, *options: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jaxtune.train", f"--config={self.config}"]
        command += [f"--config.train.output_dir={self.folder / run}"]
        command += [f"--config.train.num_steps={num_steps}", *options]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", "JAXTUNE_TEST": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, run: str, num_steps: int, *options: str, code: int = 0, **env: str) -> str:
        """Runs to the end; returns what was written to stderr."""
        with self.start(run, num_steps, *options, **env) as process:
            out, err = process.communicate(timeout=240)
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return err

    def state(self, run: str, step: int | None = None) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint: parameters, optimizer and counters."""
        store = Store(self.folder / run / "checkpoints")
        step = store.steps()[-1] if step is None else step
        forms = meta.read(store.folder / str(step)).arrays
        abstract = {}
        for path, form in forms.items():
            dtype, _, shape = form.partition("[")
            abstract[path] = jax.ShapeDtypeStruct(json.loads("[" + shape), dtype)
        restored = store.restore(step, abstract)
        store.close()
        assert restored is not None
        return {path: np.asarray(array) for path, array in restored[1].items()}

    def metrics(self, run: str) -> list[dict]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def assert_equal(self, run: str, reference: str) -> None:
        """Bitwise equal final states, and the same losses at the same steps, each once."""
        got, expected = self.state(run), self.state(reference)
        assert got.keys() == expected.keys() and len(got) > 10
        for path in expected:
            assert got[path].tobytes() == expected[path].tobytes(), path
        keys = ("step", "split", "loss", "grad_norm", "learning_rate")
        rows = [
            [[row.get(key) for key in keys] for row in self.metrics(r)] for r in (run, reference)
        ]
        assert rows[0] == rows[1]


def rows() -> list[dict]:
    """Examples of very different lengths, so that packing and accumulation are uneven."""
    rng = random.Random(0)
    words = "red blue green one two three cat dog owl runs sleeps sings".split()

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    return [{"instruction": text(5), "input": "", "output": text(3)} for _ in range(60)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    """With an uninterrupted run of 14 steps in "whole"."""
    runner = Runner(tmp_path_factory.mktemp("resume"))
    runner.run("whole", 14)
    return runner


def checkpoint_steps(runner: Runner, run: str) -> list[int]:
    return Store(runner.folder / run / "checkpoints").steps()


def test_reference_run(runner: Runner) -> None:
    assert checkpoint_steps(runner, "whole") == [12, 14]
    position = meta.read(runner.folder / "whole" / "checkpoints" / "14").position
    assert position["epoch"] >= 1, "the tests should reach a second epoch"
    assert [row["step"] for row in runner.metrics("whole")] == list(range(1, 15))


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    (
        "step_pre@2=kill",
        "step_post@8=kill",
        "save_begin@9=kill",
        "save_commit@9=kill",
        "prune@9=kill",
        "manifest@14=kill",
    ),
)
def test_killed_at_a_point_then_resumed(runner: Runner, plan: str) -> None:
    run = "point-" + plan.partition("=")[0]
    runner.run(run, 14, code=-signal.SIGKILL, JAXTUNE_FAULT=plan)
    runner.run(run, 14)
    runner.assert_equal(run, "whole")


def kill_at_random(runner: Runner, run: str, num_steps: int, times: int) -> None:
    """Kills a run again and again, mostly while it trains and saves, then lets it end."""
    rng = random.Random(times)
    for _ in range(times):
        with runner.start(run, num_steps) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("train step"):
                    break
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            time.sleep(rng.uniform(0, 0.6))
            process.kill()
            drain.join()
    runner.run(run, num_steps)


def test_killed_twice_at_random_moments(runner: Runner) -> None:
    kill_at_random(runner, "killed-twice", 14, 2)
    runner.assert_equal("killed-twice", "whole")


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(runner: Runner) -> None:
    runner.run("long", 400)
    kill_at_random(runner, "killed", 400, 10)
    runner.assert_equal("killed", "long")


@pytest.mark.parametrize(
    ("number", "code"),
    ((signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)),
)
def test_signal_saves_and_resume_is_exact(
    runner: Runner, number: signal.Signals, code: int
) -> None:
    run = f"stopped-{number.name}"
    with runner.start(run, 14, JAXTUNE_FAULT="none") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train step"):
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == code, err
    assert "Traceback" not in err and "start the same command" in err
    stopped = checkpoint_steps(runner, run)[-1]
    assert stopped < 14
    runner.run(run, 14)
    runner.assert_equal(run, "whole")


def killed_run(runner: Runner, run: str, damaged: tuple[int, ...]) -> None:
    """A run with the checkpoints 6 and 9, and a flipped byte in the `damaged` ones."""
    runner.run(run, 14, code=-signal.SIGKILL, JAXTUNE_FAULT="manifest@12=kill")
    assert checkpoint_steps(runner, run) == [6, 9]
    for step in damaged:
        folder = runner.folder / run / "checkpoints" / str(step) / "state"
        largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)


def test_flipped_byte_falls_back_and_says_so(runner: Runner) -> None:
    killed_run(runner, "flipped", damaged=(9,))
    err = runner.run("flipped", 14, "--config.checkpoint.resume=9", code=4)
    assert err.count("\n") <= 4 and "step 9" in err and "checksum differs" in err
    err = runner.run("flipped", 14)
    assert "warning: checkpoint 9 is damaged" in err and "checksum differs" in err
    runner.assert_equal("flipped", "whole")


@pytest.mark.slow
def test_all_damaged_then_started_anew(runner: Runner) -> None:
    killed_run(runner, "ruined", damaged=(6, 9))
    err = runner.run("ruined", 14, code=4)
    assert "step 9" in err and "step 6" in err and "checkpoint.resume=never" in err
    runner.run("ruined", 14, "--config.checkpoint.resume=never")
    runner.assert_equal("ruined", "whole")


@pytest.mark.slow
def test_going_back_to_an_older_step(runner: Runner) -> None:
    killed_run(runner, "back", damaged=())
    runner.run("back", 14, "--config.checkpoint.resume=6")
    runner.assert_equal("back", "whole")


def test_second_run_in_the_same_directory(runner: Runner) -> None:
    with RunLock(runner.folder / "busy"):
        err = runner.run("busy", 14, code=76)
    assert f"process {os.getpid()} on host" in err and err.count("\n") == 1
    assert sorted(p.name for p in (runner.folder / "busy").iterdir()) == ["run.lock"]


@pytest.mark.slow
def test_output_directory_that_cannot_be_used(runner: Runner) -> None:
    (runner.folder / "file").touch()
    err = runner.run("file", 14, code=2)
    assert "a file is in the way" in err and err.count("\n") == 1
    (runner.folder / "foreign").mkdir()
    (runner.folder / "foreign" / "photo.jpg").touch()
    err = runner.run("foreign", 14, code=2)
    assert "files of something else" in err and err.count("\n") == 1


def test_other_adapter_than_the_saved_one(runner: Runner) -> None:
    err = runner.run("whole", 20, "--config.peft.rank=8", code=4)
    assert "arrays differ" in err and "adapter.a" in err
    assert checkpoint_steps(runner, "whole") == [12, 14]


@pytest.mark.slow
def test_finished_run_is_left_alone(runner: Runner) -> None:
    before = runner.state("whole")
    runner.run("whole", 14)
    after = runner.state("whole")
    assert all(before[path].tobytes() == after[path].tobytes() for path in before)
    assert [row["step"] for row in runner.metrics("whole")] == list(range(1, 15))


@pytest.mark.slow
def test_full_disk_during_and_at_the_end(runner: Runner) -> None:
    err = runner.run("starved", 14, JAXTUNE_FAULT="save_commit@6=enospc")
    assert "warning: the checkpoint of step 6 could not be saved" in err
    runner.assert_equal("starved", "whole")
    err = runner.run("starved-end", 14, JAXTUNE_FAULT="save_commit@14=enospc", code=74)
    assert "error: the checkpoint of step 14 could not be saved" in err
    assert checkpoint_steps(runner, "starved-end") == [9, 12]
    runner.run("starved-end", 14)
    runner.assert_equal("starved-end", "whole")
