"""Killed writers of checkpoints and full disks, in processes of their own."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.checkpoint.store import Store
from tests.checkpoint.states import abstract, restore

WRITER = """
import sys, jax, jax.numpy as jnp
from jaxtune.checkpoint.store import Store
folder, first, last, elements = sys.argv[1], *map(int, sys.argv[2:])
store = Store(folder, keep_last=2)
try:
    abstract = {"x": jax.ShapeDtypeStruct((elements,), jnp.float32), "y": jnp.int32(0)}
    found = store.restore(None, abstract)
    assert (found[0] if found else 0) == first - 1, found
    for step in range(first, last):
        state = {"x": jnp.arange(elements, dtype=jnp.float32) * step, "y": jnp.int32(step)}
        store.save(step, state, {"row": step})
        print(step, flush=True)
finally:
    store.close()
print("failed", store.failed_saves, flush=True)
"""


def writer(folder: Path, first: int, last: int, elements: int = 10_000, **env: str):
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(last), str(elements)]
    root = Path(__file__).parents[2]
    env = {**os.environ, "XLA_FLAGS": "", "JAXTUNE_TEST": "1", "PYTHONPATH": str(root), **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def newest_is_exact(folder: Path, elements: int = 10_000) -> int:
    like = {"x": jnp.zeros(elements, jnp.float32), "y": jnp.int32(0)}
    found = restore(folder, like=like)
    if found is None:
        return 0
    step, state, position = found
    assert int(state["y"]) == step == position["row"]
    expected = np.arange(elements, dtype=np.float32) * np.float32(step)
    assert np.array_equal(np.asarray(state["x"]), expected)
    return step


@pytest.mark.parametrize("point", ("save_begin", "save_bg", "save_commit", "manifest", "prune"))
def test_killed_at_a_point(tmp_path: Path, point: str) -> None:
    process = writer(tmp_path, 1, 9, JAXTUNE_FAULT=f"{point}@4=kill")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert newest_is_exact(tmp_path) == (4 if point == "prune" else 3)
    assert len(Store(tmp_path).steps()) == 2
    store = Store(tmp_path, keep_last=2)
    store.restore(None, abstract({"x": jnp.zeros(10_000, jnp.float32), "y": jnp.int32(0)}))
    store.save(7, {"x": jnp.zeros(10_000, jnp.float32), "y": jnp.int32(7)}, {"row": 7}, final=True)
    store.close()
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())


def kill_randomly(folder: Path, times: int) -> None:
    rng = np.random.default_rng(times)
    newest = 0
    for _ in range(times):
        with writer(folder, newest + 1, 10**6) as process:
            assert process.stdout is not None
            for _ in range(3):  # the third save has begun: the second is finished
                process.stdout.readline()
            # Drained, so that the writer never blocks on a full pipe.
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            drain.join()
        found = newest_is_exact(folder)
        assert found >= newest + 2
        newest = found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_randomly(tmp_path, 2)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    kill_randomly(tmp_path, 20)


def test_file_size_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: writes of large files fail with EFBIG, the portable full disk."""
    elements = 2_000_000
    pytest.importorskip("resource")
    script = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + WRITER
    script = script.replace(
        "        store.save(step",
        "        limit = 1 << 20 if step in (2, 3) else resource.RLIM_INFINITY\n"
        "        store.wait()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "        store.save(step",
    ).replace("* step,", "* step + jnp.sin(jnp.arange(elements) * 1.1) * 0,")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "1", "5", str(elements)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "failed 2" in done.stdout
    assert done.stderr.count("could not be saved: File too large\n") == 2
    # Tensorstore now and then tells of a callback that came too late; nothing else may.
    assert done.stderr.count("Traceback") == done.stderr.count("Event loop is closed\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
    assert newest_is_exact(tmp_path, elements) == 4


SMALL_DISK = """
import subprocess, sys, numpy as np, jax.numpy as jnp
from jaxtune.checkpoint.store import Store
from jaxtune.errors import StorageError
folder, options, elements = sys.argv[1], sys.argv[2], int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
store = Store(folder, keep_last=1)

def save(step, **kwargs):
    noise = np.random.default_rng(step).normal(size=elements).astype(np.float32)
    store.save(step, {"x": jnp.asarray(noise)}, {"row": step}, **kwargs)

save(1, final=True)
save(2)
store.wait()
print(store.failed_saves, store.steps(), flush=True)
try:
    save(3, final=True)
except StorageError as error:
    print("refused:", error)
print(store.steps(), flush=True)
subprocess.run(["mount", "-o", "remount,size=256m,nr_inodes=999", folder], check=True)
save(4, final=True)
abstract = {"x": jnp.zeros(elements)}
print(store.restore(None, abstract)[0], flush=True)
store.close()
subprocess.run(["ls", "-A", folder])
"""


@pytest.mark.parametrize(
    ("options", "elements"), (("size=24m", 4_000_000), ("size=99m,nr_inodes=30", 1_000))
)
def test_full_file_system(tmp_path: Path, options: str, elements: int) -> None:
    """Space or inodes for one checkpoint only; then room is made."""
    command = ["unshare", "-m", sys.executable, "-c", SMALL_DISK, str(tmp_path), options]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs `unshare -m`")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, str(elements)],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1 [1]"
    assert lines[1].startswith("refused: the checkpoint of step 3 could not be saved")
    assert lines[2:] == ["[1]", "4", "4"]
    assert done.stderr.count("Traceback") == done.stderr.count("Event loop is closed\n")
