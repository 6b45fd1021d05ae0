"""One run per directory: who gets it, who is turned away, and what is left alone."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.checkpoint import lock
from jaxtune.checkpoint.lock import RunLock
from jaxtune.errors import ConfigError, LockedError, StorageError

ROOT = Path(__file__).parents[2]


def test_lock_creates_the_directory_and_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with RunLock(folder):
        record = json.loads((folder / "run.lock").read_text())
        assert record["pid"] == os.getpid() and record["host"] == socket.gethostname()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on host"):
            RunLock(folder)
    assert [path.name for path in folder.iterdir()] == ["run.lock"]
    again = RunLock(folder)
    again.release()
    again.release()


def test_second_process_is_told_who_holds_it_until_that_one_is_killed(
    tmp_path: Path, capsys
) -> None:
    script = (
        "import sys, time; from jaxtune.checkpoint.lock import RunLock\n"
        "lock = RunLock(sys.argv[1]); print('ok', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ok\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on host") as raised:
            RunLock(tmp_path)
        assert raised.value.exit_code == 76
        assert holder.poll() is None
        holder.send_signal(signal.SIGKILL)
    with RunLock(tmp_path):
        assert f"took over {tmp_path} from process {holder.pid}" in capsys.readouterr().err


def record(**changes: object) -> dict:
    mine = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": lock._boot_id(),
        "process_start": lock._process_start(os.getpid()),
    }
    return mine | changes


@pytest.mark.parametrize(
    "changes",
    (
        {"pid": 2**22 + 1},  # dead
        {"process_start": "1"},  # another process has its pid now
        {"boot_id": "before the reboot"},
        {"host": "another container of this machine"},
    ),
)
def test_stale_lock_is_taken_over(tmp_path: Path, capsys, changes: dict) -> None:
    (tmp_path / "run.lock").write_text(json.dumps(record(**changes)))
    with RunLock(tmp_path):
        assert "took over" in capsys.readouterr().err
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("changes", ({}, {"host": "far-away", "boot_id": "another machine's"}))
def test_lock_of_a_live_or_distant_run_is_respected(tmp_path: Path, changes: dict) -> None:
    text = json.dumps(record(**changes))
    (tmp_path / "run.lock").write_text(text)
    with pytest.raises(LockedError, match="delete .*run.lock"):
        RunLock(tmp_path)
    assert (tmp_path / "run.lock").read_text() == text


@pytest.mark.parametrize("text", ("", '{"pid": 12', "[]", "null"))
def test_unfinished_record_is_no_holder(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.lock").write_text(text)
    RunLock(tmp_path).release()


def test_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="files of something else .config.json"):
        RunLock(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thesis.tex"]


def test_own_and_nearly_empty_directories_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".gitkeep").touch()
    RunLock(tmp_path / "a").release()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"train": {}, "checkpoint": {}}')
    (tmp_path / "b" / "metrics.jsonl").touch()
    RunLock(tmp_path / "b").release()


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="a file is in the way"):
            RunLock(path)


def test_write_that_fails_is_found_at_once(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        RunLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory(tmp_path: Path) -> None:
    """A read-only mount, since root may write anywhere else."""
    script = (
        f"mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c '"
        "from jaxtune.checkpoint.lock import RunLock\n"
        "from jaxtune.errors import run_command\n"
        f'run_command(lambda: RunLock("{tmp_path}/run"))\''
    )
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs `unshare -m`")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith("jaxtune: error: train.output_dir=")
    assert "Read-only file system" in done.stderr and done.stderr.count("\n") == 1
