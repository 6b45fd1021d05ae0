"""Plans for devices that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtune import build, fit, models, plan
from jaxtune.checkpoint.source import open_checkpoint, open_description
from jaxtune.errors import ConfigError, DoesNotFitError, WeightError
from jaxtune.planning import account
from jaxtune.schema import Data, Mesh, Model, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh

ROOT = Path(__file__).resolve().parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'lora_llama.py'}"


def planned(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: the devices are chosen once."""
    command = [sys.executable, "-m", "jaxtune.plan", CONFIG, "--config.data.train=none.jsonl"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)


TINY = (
    "--config.model.path=tiny:llama",
    "--config.model.tokenizer=none",
    "--config.data.max_seq_len=64",
)


def test_eight_devices_hold_an_eighth():
    def found(topology: str) -> dict[str, Any]:
        rows = 8 // int(topology.partition(":")[2])
        result = planned(
            *TINY,
            f"--config.train.micro_batch_size={rows}",
            f"--topology={topology}",
            "--json",
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    one, eight = found("cpu:1"), found("cpu:8")
    assert eight["devices"] == eight["mesh"]["fsdp"] == 8
    assert one["rows"] == eight["rows"] and one["model_tflop"] == eight["model_tflop"]
    assert one["parameters"] == eight["parameters"] > one["trained"] > 0
    assert one["received"] == []
    kinds = {(part["kind"], part["axes"]) for part in eight["received"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "fsdp")} <= kinds
    assert one["flops"] / 8 < eight["flops"] < one["flops"]
    for kind in ("adapters", "optimizer"):  # the optimizer's count of steps is whole everywhere
        assert one[kind] / 8 <= eight[kind] < one[kind] / 8 + 64, kind
    assert one["weights"] / 8 <= eight["weights"] <= 0.3 * one["weights"]


def test_the_table_says_it_in_words():
    result = planned(*TINY, "--topology=cpu:2")
    assert result.returncode == 0, result.stderr
    assert "2 x cpu (cpu:2) fsdp=2" in result.stdout
    for word in ("weights", "adapters", "optimizer", "temporaries", "a device", "program"):
        assert f"\n{word}" in result.stdout


def test_a_topology_must_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["plan", CONFIG])
    with pytest.raises(ConfigError, match="--topology=NAME is missing"):
        plan.main()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--fit=tokens",), "invalid choice: 'tokens'"),
        (("--fit=max_seq", "--search"), "two questions"),
        (("--compiles=3",), "how many layouts --search compiles"),
        (("--search", "--compiles=0"), "at least 1"),
    ],
)
def test_questions_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], problem: str
):
    monkeypatch.setattr(sys, "argv", ["plan", CONFIG, "--topology=cpu:1", *arguments])
    with pytest.raises(ConfigError, match=problem):
        plan.main()


def config(**model: Any) -> RunConfig:
    return RunConfig(
        model=Model(**model),
        data=Data(train=("none.jsonl",), max_seq_len=64),
        train=Train(micro_batch_size=2),
        mesh=Mesh(fsdp=-1),
    )


def test_the_plan_is_the_step_that_trains():
    """Its arguments are those of the run, and memory is that of the compiled program."""
    cfg = config(path="tiny:llama", remat="full")
    found = account.plan(cfg, "cpu:1", jax.devices()[:1])
    assert found.remat == "full" and found.length == 64 and found.rows == 2
    held = found.weights + found.adapters + found.optimizer
    assert found.total >= held + found.temporaries
    assert found.host == 0 and found.received == [] and found.estimate is None
    assert not found.unread_loops
    # 3 forward and backward passes' worth of products, one of them again, and adapters' own.
    assert 1.0 < found.flops / (found.model_tflop * 1e12) < 2.0


def test_what_does_not_fit_is_an_error_of_its_own():
    fit.check_fits(10, None, "a device")
    fit.check_fits(94, 100, "a device")
    with pytest.raises(DoesNotFitError, match=r"of a device can be used - lower") as error:
        fit.check_fits(96, 100, "a device")
    assert error.value.exit_code == 6


def test_sizes_need_no_files(tmp_path: Path):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    sizes = {"8b": 8_030_261_248, "70b": 70_553_706_496, "1b": 1_235_814_400}
    for name, count in (sizes | {"104b": 103_810_609_152}).items():
        checkpoint = open_description(f"llama:{name}")
        run = build.describe(config(path=f"llama:{name}"), mesh, checkpoint)
        adapters = sum(leaf.size for leaf in run.trainable.values())
        total = sum(leaf.size for leaf in (run.frozen | run.trainable).values())
        scales = sum(leaf.size for n, leaf in run.frozen.items() if n.endswith("adapter.scale"))
        assert total - adapters - scales == count, name
        with pytest.raises(WeightError, match="has no weights"):
            checkpoint.read("norm.weight")
    with pytest.raises(WeightError, match="llama:9b: no such size - known: llama:1b"):
        open_description("llama:9b")
    (tmp_path / "config.json").write_text(json.dumps(models.sized("llama", "1b")))
    assert open_description(str(tmp_path)).config["hidden_size"] == 2048
    with pytest.raises(WeightError):
        open_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_an_8b_model_on_tpus():
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    model = ("--config.model.path=llama:8b", "--config.data.max_seq_len=2048")
    batch = ("--config.train.micro_batch_size=1", "--config.peft.rank=16")
    share = planned(*model, *batch, "--config.model.remat=full", "--topology=v5e:4x4", "--json")
    assert share.returncode == 0, share.stderr
    found = json.loads(share.stdout)
    assert found["devices"] == 16 and found["total"] < 3.6 * 2**30
    one = planned(*model, *batch, "--config.model.remat=full", "--topology=v5e:1x1")
    assert one.returncode == 6 and "the compiler needs" in one.stderr


@pytest.mark.slow
def test_stages_compile_for_tpus_with_their_kernels(tmp_path: Path):
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "head_dim": 128, "vocab_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(models.sized("llama", "1b") | sizes))
    result = planned(
        f"--config.model.path={tmp_path}",
        "--config.model.tokenizer=none",
        "--config.data.max_seq_len=512",
        "--config.quant.format=int8",
        "--config.model.remat=full",
        "--config.train.micro_batch_size=4",
        "--config.mesh.stage=2",
        "--config.mesh.fsdp=2",
        "--topology=v5e:2x2",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mesh"]["stage"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_experts_compile_for_tpus_and_cost_what_is_chosen(tmp_path: Path, method: str):
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    sizes |= {"head_dim": 128, "vocab_size": 2048, "num_local_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps(models.sized("mixtral", "8x7b") | sizes))
    result = planned(
        f"--config.model.path={tmp_path}",
        "--config.model.tokenizer=none",
        f"--config.peft.method={method}",
        "--config.data.max_seq_len=512",
        "--config.model.remat=full",
        "--config.train.micro_batch_size=4",
        "--config.mesh.expert=2",
        "--config.mesh.fsdp=2",
        "--topology=v5e:2x2",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # Forward twice and backward; a gradient of all experts would cost eight times the chosen ones'.
    assert found["flops"] * found["devices"] < 2.2 * found["model_tflop"] * 1e12
