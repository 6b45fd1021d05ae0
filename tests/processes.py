"""Runs of the training command in several real processes on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from jaxtune.checkpoint.safetensors import read_folder, read_tensor

ROOT = Path(__file__).parents[1]
CONFIG = """
from jaxtune import config

def get_config():
    c = config.default()
    c.model.path = "tiny:llama"
    c.peft.rank = 4
    c.data.train = ({data!r},)
    c.data.max_seq_len = 128
    c.optim.learning_rate = 1e-2
    c.optim.schedule = "constant"
    c.train.micro_batch_size = 2
    c.train.num_steps = 6
    c.train.compilation_cache = {cache!r}
    c.checkpoint.every_steps = 3
    c.distributed.silence_seconds = 4
    c.log.progress = "plain"
    c.log.tensorboard = False
    c.log.plot = False
    return c
"""
WORDS = "red blue green one two three cat dog owl runs sleeps sings".split()


class Launch:
    """`launch/local.py` at work.

    Attributes:
        lines: what it has printed.
    """

    def __init__(self, command: list[str], env: dict[str, str]):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line for line in self.process.stdout)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def until(self, text: str) -> None:
        """Waits until a line holds the text."""
        deadline = time.monotonic() + 120
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def signal(self, number: int, which: signal.Signals) -> None:
        """Sends a signal to one of the processes."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == str(self.process.pid) and b"JAX_PROCESS_ID=%d" % number in environment:
                return os.kill(int(entry.name), which)
        raise AssertionError(f"process {number} does not run:\n{self.output}")

    def wait(self, code: int) -> str:
        """Waits for the end; returns what was printed."""
        assert self.process.wait(timeout=180) == code, self.output
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.output


class Runs:
    """A folder with a small data set, a config, and runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        data, self.config = folder / "data.jsonl", folder / "config.py"
        random = np.random.default_rng(0)
        rows = []
        for _ in range(40):
            words = random.choice(WORDS, random.integers(2, 8)).tolist()
            rows.append({"instruction": " ".join(words[1:]), "input": "", "output": words[0]})
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config.write_text(CONFIG.format(data=str(data), cache=str(folder / "cache")))

    def arguments(self, run: str, *options: str) -> list[str]:
        """Arguments of the training command."""
        output = f"--config.train.output_dir={self.folder / run}"
        return [f"--config={self.config}", output, *options]

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Variables of a process with so many CPU devices."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        known = {"XLA_FLAGS": flags, "JAXTUNE_TEST": "1", "PYTHONPATH": str(ROOT)}
        return {**os.environ, **known}

    def one(self, run: str, *options: str, devices: int) -> str:
        """A whole run in one process; returns what it printed."""
        command = [sys.executable, "-m", "jaxtune.train", *self.arguments(run, *options)]
        env = self.environment(devices)
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def many(self, run: str, *options: str, processes: int, devices: int = 1) -> Launch:
        """Starts a run in many processes."""
        command = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}"]
        command += ["--", *self.arguments(run, *options)]
        return Launch(command, self.environment(devices))

    def steps(self, run: str) -> list[int]:
        """The checkpoints of a run."""
        names = (path.name for path in (self.folder / run / "checkpoints").iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def losses(self, run: str) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of every training row."""
        rows = map(json.loads, (self.folder / run / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if r["split"] == "train"]

    def exported(self, run: str, what: str = "adapter") -> dict[str, np.ndarray]:
        """The tensors of an exported folder."""
        found = read_folder(self.folder / run / what)
        return {name: read_tensor(location) for name, location in found.items()}

    def assert_same(self, run: str, reference: str) -> None:
        """The same steps with bitwise the same losses, and bitwise the same adapter."""
        assert self.losses(run) == self.losses(reference)
        got, expected = self.exported(run), self.exported(reference)
        assert got.keys() == expected.keys() and len(got) > 10
        assert all((got[name] == expected[name]).all() for name in expected)
