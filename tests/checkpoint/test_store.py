"""Saving, verifying, falling back and pruning checkpoints."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtune.checkpoint import manifest, steps
from jaxtune.checkpoint.store import Store
from jaxtune.errors import StorageError, WeightError

DAMAGES = ("truncate", "flip", "empty", "delete")


def make_state(seed: int = 0) -> dict:
    """Nested, of several dtypes, with a scalar and a name that has dots."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"layers.0.kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)},
        "opt": [
            jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16),
            jnp.asarray(rng.integers(0, 99, (4, 2)), jnp.int32),
        ],
        "step": jnp.int32(seed),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got: dict, expected: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved_run(folder: Path, saved_steps: tuple[int, ...] = (3, 6), **options) -> Store:
    """A closed store with states made from the step numbers."""
    store = Store(folder, **{"keep_last": 5, **options})
    for step in saved_steps:
        store.save(step, make_state(step), {"row": step}, metric=None)
    store.close()
    return store


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def restore(folder: Path, step: int | None = None, like: dict | None = None, verify: str = "full"):
    store = Store(folder, verify=verify)
    try:
        return store.restore(step, abstract(like or make_state()))
    finally:
        store.close()


def test_round_trip(tmp_path: Path) -> None:
    saved_run(tmp_path)
    step, state, position = restore(tmp_path)
    assert (step, position) == (6, {"row": 6})
    assert_same(state, make_state(6))
    assert_same(restore(tmp_path, 3)[1], make_state(3))
    assert Store(tmp_path).steps() == [3, 6]


def test_nothing_saved(tmp_path: Path) -> None:
    assert restore(tmp_path / "absent") is None
    with pytest.raises(WeightError, match="no checkpoint of step 4 .* there are none"):
        restore(tmp_path, 4)
    assert not (tmp_path / "absent").exists()


def test_state_may_be_donated_after_save(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=9)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for step in range(4):
        values = jnp.full((512, 1024), step + 0.5)
        store.save(step, {"x": values}, {})
        overwrite(values).block_until_ready()
    store.close()
    for step in range(4):
        _, state, _ = restore(tmp_path, step, like={"x": jnp.zeros((512, 1024))})
        assert np.all(np.asarray(state["x"]) == step + 0.5)


def step_files(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_file_falls_back_or_restores_exactly(tmp_path: Path, capfd, how: str) -> None:
    saved_run(tmp_path / "good")
    names = step_files(tmp_path / "good" / "6")
    assert len(names) >= 10
    for name in names:
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder)
        damage(folder / "6" / name, how)
        step, state, position = restore(folder)
        assert position == {"row": step}
        assert_same(state, make_state(step))
        message = capfd.readouterr().err
        if Path(name).name in manifest.IGNORED:
            assert step == 6
        else:
            assert step == 3, name
            assert "warning: checkpoint 6 is damaged" in message
            with pytest.raises(WeightError, match="step 6") as raised:
                restore(folder, 6)
            if (name, how) != ("manifest.json", "flip"):  # may blame the file of the flipped line
                assert name in message and name in str(raised.value)
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ("truncate", "delete"))
def test_sizes_alone_show_missing_bytes(tmp_path: Path, how: str) -> None:
    saved_run(tmp_path)
    largest = max((tmp_path / "6").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    damage(largest, how)
    assert restore(tmp_path, verify="size")[0] == 3


def test_unverified_restore_survives_unreadable_files(tmp_path: Path) -> None:
    saved_run(tmp_path)
    damage(tmp_path / "6" / "state" / "_METADATA", "truncate")
    step, state, _ = restore(tmp_path, verify="off")
    assert step == 3
    assert_same(state, make_state(3))


def test_all_damaged(tmp_path: Path) -> None:
    saved_run(tmp_path)
    damage(tmp_path / "3" / "meta.json", "flip")
    damage(tmp_path / "6" / "manifest.json", "delete")
    with pytest.raises(WeightError) as raised:
        restore(tmp_path)
    message = str(raised.value)
    assert "step 6: manifest.json: missing" in message
    assert "step 3: meta.json: checksum differs" in message
    assert "checkpoint.resume=never" in message


def test_what_is_not_a_checkpoint_is_ignored_and_kept(tmp_path: Path, capfd) -> None:
    saved_run(tmp_path)
    (tmp_path / "99").mkdir()
    (tmp_path / "123").symlink_to("/etc")
    (tmp_path / "55").write_text("stray")
    (tmp_path / "abc").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "8.tmp").mkdir()  # ours: a killed save
    store = Store(tmp_path, keep_last=1)
    assert store.restore(None, abstract(make_state()))[0] == 6
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in ("99", "123", "55", "abc", "007", "7.orbax"))
    for step in (55, 123):  # their names are needed: they step aside
        store.save(step, make_state(step), {"row": step})
    store.close()
    assert store.failed_saves == 0
    assert restore(tmp_path)[0] == 123
    left = {path.name.split(".set-aside")[0] for path in tmp_path.iterdir()}
    assert left == {"99", "123", "55", "abc", "007", "7.orbax-checkpoint-tmp"}
    assert Path("/etc/passwd").exists()


def test_other_state_is_refused_before_reading(tmp_path: Path) -> None:
    saved_run(tmp_path)
    other = make_state()
    other["params"] = {"layers.0.kernel": jnp.zeros((8, 17)), "extra": jnp.zeros(2)}
    other["opt"][0] = other["opt"][0].astype(jnp.float32)
    with pytest.raises(WeightError) as raised:
        restore(tmp_path, like=other)
    message = str(raised.value)
    assert "3 arrays differ" in message
    assert "params.layers.0.kernel: saved float32[8, 16], this run float32[8, 17]" in message
    assert "params.extra: saved nothing, this run float32[2]" in message
    assert "opt.0: saved bfloat16[16], this run float32[16]" in message


def test_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises(WeightError, match="... and 3 more"):
        restore(tmp_path, like={"other": [jnp.zeros(1)] * 4})


def test_newer_format(tmp_path: Path) -> None:
    saved_run(tmp_path, (3,))
    meta = json.loads((tmp_path / "3" / "meta.json").read_text())
    (tmp_path / "3" / "meta.json").write_text(
        json.dumps(meta | {"format_version": 99, "jaxtune": "9.9"})
    )
    manifest.write(tmp_path / "3")
    with pytest.raises(WeightError, match=r"written by jaxtune 9\.9 \(format 99\)"):
        restore(tmp_path)


def test_other_configuration_is_told(tmp_path: Path, capfd) -> None:
    saved_run(tmp_path, (3,), fingerprint="a")
    store = Store(tmp_path, fingerprint="b")
    assert store.restore(None, abstract(make_state()))[0] == 3
    store.close()
    assert "saved with another configuration" in capfd.readouterr().err


def test_keeps_newest_and_best(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=2, keep_best=1)
    for step, metric in enumerate([5.0, 1.0, float("nan"), 3.0, None, 4.0]):
        store.save(step, make_state(step), {}, metric=metric)
    store.close()
    assert store.steps() == [1, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4", "5"]


def test_going_back_abandons_newer_steps(tmp_path: Path) -> None:
    saved_run(tmp_path, (3, 6, 9))
    store = Store(tmp_path, keep_last=5)
    assert store.restore(3, abstract(make_state()))[0] == 3
    assert store.steps() == [3, 6, 9]
    store.save(4, make_state(4), {})
    store.close()
    assert store.steps() == [3, 4]


def test_fresh_start_replaces_the_old_run(tmp_path: Path) -> None:
    saved_run(tmp_path, (3, 6))
    store = Store(tmp_path, keep_last=5)
    store.save(3, make_state(33), {"row": 33})
    store.close()
    assert store.steps() == [3]
    assert_same(restore(tmp_path)[1], make_state(33))


def test_step_is_saved_once(tmp_path: Path) -> None:
    store = saved_run(tmp_path, (3,))
    before = (tmp_path / "3").stat().st_ino
    store = Store(tmp_path)
    store.restore(None, abstract(make_state()))
    store.save(3, make_state(4), {}, final=True)
    store.close()
    assert (tmp_path / "3").stat().st_ino == before


@pytest.fixture
def planned_fault(monkeypatch):
    def plan(text: str) -> None:
        monkeypatch.setenv("JAXTUNE_TEST", "1")
        monkeypatch.setenv("JAXTUNE_FAULT", text)

    return plan


@pytest.mark.parametrize("point", ("save_begin", "save_bg", "save_commit", "manifest"))
def test_failed_save_is_a_warning_then_space_returns(
    tmp_path: Path, capfd, planned_fault, point: str
) -> None:
    planned_fault(f"{point}@6=enospc")
    store = Store(tmp_path, keep_last=2)
    for step in (3, 6, 9, 12):
        store.save(step, make_state(step), {"row": step})
    store.wait()
    assert store.failed_saves == 1
    assert store.steps() == [9, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "9"]
    store.close()
    assert "checkpoint of step 6 could not be saved" in capfd.readouterr().err


def test_failed_final_save_is_an_error(tmp_path: Path, planned_fault) -> None:
    planned_fault("save_commit@6=enospc")
    store = Store(tmp_path)
    store.save(3, make_state(3), {})
    store.save(6, make_state(6), {})
    with pytest.raises(StorageError, match=r"step 6 could not be saved.*\[3\]"):
        store.save(6, make_state(6), {}, final=True)
    planned_fault("none")
    store.save(6, make_state(6), {}, final=True)
    store.close()
    store.close()
    assert store.steps() == [3, 6]


def test_little_space_skips_a_periodic_save(tmp_path: Path, capfd, monkeypatch) -> None:
    store = Store(tmp_path)
    store.save(3, make_state(3), {})
    store.wait()
    full = shutil._ntuple_diskusage(10**6, 10**6, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    store.save(6, make_state(6), {})
    assert store.failed_saves == 1 and store.steps() == [3]
    assert "MB needed" in capfd.readouterr().err
    store.save(9, make_state(9), {}, final=True)
    store.close()
    assert store.steps() == [3, 9]


def test_pruning_never_lists_half_a_step(tmp_path: Path) -> None:
    saved_run(tmp_path, (1, 2, 3))
    steps.keep_only(tmp_path, {3})
    assert steps.finished(tmp_path) == [3]
    assert restore(tmp_path)[0] == 3
    saved_run(tmp_path, (4,))
    assert not (tmp_path / ".trash").exists()


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    def place(shape: tuple[int, int], spec: PartitionSpec) -> NamedSharding:
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, spec)

    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    saved = {"w": jax.device_put(values, place((8, 1), PartitionSpec("fsdp", "tensor")))}
    store = Store(tmp_path)
    store.save(1, saved, {})
    store.close()
    for shape, spec in (((2, 4), PartitionSpec("fsdp", "tensor")), ((4, 2), PartitionSpec())):
        sharding = place(shape, spec)
        wanted = {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=sharding)}
        store = Store(tmp_path)
        _, state, _ = store.restore(None, wanted)
        store.close()
        assert state["w"].sharding.is_equivalent_to(sharding, 2)
        assert np.array_equal(np.asarray(state["w"]), values)


# Killed writers and full disks, in processes of their own.

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
