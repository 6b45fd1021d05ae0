import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import build, config, optim
from jaxtune.checkpoint.safetensors import read_folder, read_tensor
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.store import Store
from jaxtune.errors import ConfigError, WeightError
from jaxtune.export import export, parse_arguments
from jaxtune.schema import Checkpoint, Data, Model, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh

SMALL: dict[str, Any] = {"rank": 4, "target_modules": ("q_proj", "down_proj")}


def run_folder(folder: Path, layers: str = "scan", **peft: Any) -> tuple[Path, dict[str, Any]]:
    """A run's folder with checkpoints of steps 1 and 2, and the parameters of step 2."""
    cfg = RunConfig(
        model=Model(path="tiny:llama", layers=layers),
        peft=Peft(**(peft or SMALL)),
        data=Data(train=("rows.jsonl",)),
        train=Train(output_dir=str(folder), num_steps=2),
        checkpoint=Checkpoint(keep_last=2),
    )
    folder.mkdir()
    saved = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layers="auto"))
    (folder / "config.json").write_text(config.to_json(saved))
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])
    run = build.describe(cfg, mesh, open_checkpoint(cfg.model.path))
    schedule = optim.make_schedule(cfg.optim, 2)
    tx = optim.make_optimizer(cfg.optim, schedule, build.trained_axes(run))
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    store = Store(folder / "checkpoints", keep_last=2)
    try:
        for step in (1, 2):
            random = np.random.default_rng(step)
            for name, leaf in run.trainable.items():
                array = random.normal(size=leaf.shape).astype(np.float32)
                values[name] = jax.device_put(array, leaf.sharding)
            state = build.initial_state(run, tx, values)
            store.save(step, dataclasses.replace(state, step=state.step + step), {}, final=True)
    finally:
        store.close()
    return folder, {name: np.asarray(values[name]) for name in run.trainable}


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_adapter_and_merged(tmp_path: Path, layers: str):
    run, params = run_folder(tmp_path / "run", layers)
    paths = export(run, tmp_path / "out", to="both", dtype="float32", max_shard_gb=0.0001)
    assert paths == {name: tmp_path / "out" / name for name in ("adapter", "merged")}
    slot, index = ("layers.0", 1) if layers == "scan" else ("layers.1", 0)
    a = params[f"{slot}.attn.q_proj.adapter.a"][index]
    b = params[f"{slot}.attn.q_proj.adapter.b"][index]
    merged, tiny = open_checkpoint(str(paths["merged"])), open_checkpoint("tiny:llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(
        merged.read(name), tiny.read(name) + 32.0 / 4 * (a @ b).T, rtol=1e-5, atol=1e-5
    )
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(merged.read(name), tiny.read(name))
    files = {path.name for path in paths["merged"].iterdir()}
    assert files >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    fields = json.loads((paths["adapter"] / "adapter_config.json").read_text())
    assert (fields["r"], fields["target_modules"]) == (4, ["down_proj", "q_proj"])


def test_chosen_step(tmp_path: Path):
    run, _ = run_folder(tmp_path / "run")
    older = export(run, tmp_path / "one", step=1)["adapter"] / "adapter_model.safetensors"
    newer = export(run, tmp_path / "two")["adapter"] / "adapter_model.safetensors"
    again = export(run, tmp_path / "three", step=2)["adapter"] / "adapter_model.safetensors"
    assert older.read_bytes() != newer.read_bytes() == again.read_bytes()
    with pytest.raises(WeightError, match="no checkpoint of step 9"):
        export(run, tmp_path / "out", step=9)


@pytest.mark.parametrize("layer", [0, 2])
def test_unrolled_run_with_one_adapted_layer(tmp_path: Path, layer: int):
    run, params = run_folder(tmp_path / "run", "unroll", **SMALL, layers_to_transform=(layer,))
    folder = export(run, tmp_path / "out")["adapter"]
    tensors = read_folder(folder)
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
    a = params[f"layers.{layer}.attn.q_proj.adapter.a"][0]
    np.testing.assert_array_equal(read_tensor(tensors[name]), a.T)
    assert all(f".layers.{layer}." in name for name in tensors)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_damaged_newest_step(tmp_path: Path, layers: str):
    run, _ = run_folder(tmp_path / "run", layers)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("a", "b", "c")]
    export(run, files[0].parent, step=1)
    (run / "checkpoints" / "2" / "meta.json").write_text("{")
    export(run, files[1].parent, step=1)
    export(run, files[2].parent)  # falls back to step 1
    assert len({file.read_bytes() for file in files}) == 1
    with pytest.raises(WeightError, match=r"step 2: meta\.json"):
        export(run, tmp_path / "out", step=2)


def test_full_fine_tuning(tmp_path: Path):
    run, params = run_folder(tmp_path / "run", method="full")
    with pytest.raises(ConfigError, match="--to=merged"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", to="merged")
    merged = open_checkpoint(str(tmp_path / "out"))
    head = merged.read("lm_head.weight")
    np.testing.assert_array_equal(head, params["lm_head.kernel"].T)


def test_folders_that_are_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        export(tmp_path / "absent", tmp_path / "out")
    run, _ = run_folder(tmp_path / "run")
    for step in (1, 2):
        (run / "checkpoints" / str(step)).rename(tmp_path / f"moved{step}")
    with pytest.raises(WeightError, match="no checkpoint in"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_shard_sizes_that_are_none(tmp_path: Path, size: float):
    with pytest.raises(ConfigError, match="max_shard_gb=.* above 0"):
        export(tmp_path, tmp_path / "out", max_shard_gb=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=a"], "required: --out"),
        (["--run=a", "--out=b", "--to=onnx"], "invalid choice: 'onnx'"),
        (["--run=a", "--out=b", "--dtyp=float32"], "unrecognized arguments: --dtyp"),
        (["--run=a", "--out=b", "--step=last"], "invalid int value"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)
