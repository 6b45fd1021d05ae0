"""Saving, verifying, falling back and pruning checkpoints."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtune.checkpoint import manifest, steps
from jaxtune.checkpoint.store import Store
from jaxtune.errors import StorageError, WeightError
from tests.checkpoint.states import abstract, assert_same, damage, make_state, restore, saved_run

DAMAGES = ("truncate", "flip", "empty", "delete")


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
