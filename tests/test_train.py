"""Whole runs of tiny:llama on the test session's eight devices, and what bad input gets."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxtune
from jaxtune import config, data
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.lock import RunLock
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import run_command
from jaxtune.schema import Data, Eval, Log, Optim, Peft, RunConfig, Train
from jaxtune.train import Result, main, train, warn_of_changes
from tests import oracle

ROOT = Path(__file__).parents[1]
WORDS = "red blue green one two three cat dog owl runs sleeps sings".split()


def write_rows(path: Path, count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = random.choice(WORDS, random.integers(1, 4)).tolist()
        rows.append({"instruction": " ".join(words), "input": "", "output": words[0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_config(folder: Path, run: str, **sections: Any) -> RunConfig:
    """Four steps of eight packed rows; `sections` are dictionaries of changed fields."""
    folder.mkdir(exist_ok=True)
    base = RunConfig(
        peft=Peft(rank=4),
        data=Data(
            train=(write_rows(folder / "train.jsonl", 100, 0),),
            eval=(write_rows(folder / "eval.jsonl", 10, 1),),
            max_seq_len=128,
        ),
        optim=Optim(learning_rate=1e-2),
        train=Train(
            output_dir=str(folder / run), num_steps=4, micro_batch_size=1, compilation_cache=""
        ),
        eval=Eval(batch_size=1),
        log=Log(progress="plain", tensorboard=False, plot=False),
    )
    changed = {
        name: dataclasses.replace(getattr(base, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(base, **changed)


class Finished:
    """A LoRA run with everything switched on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = run_config(
            folder,
            "run",
            eval={"every_steps": 2, "exact_match": True, "max_rows": 2, "max_new_tokens": 4},
            checkpoint={"every_steps": 2, "export_merged": True, "keep_best": 1},
            log={"tensorboard": True, "plot": True},
        )
        self.result: Result = train(self.config)

    def rows(self, split: str) -> list[dict[str, Any]]:
        lines = self.result.paths["metrics"].read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"))


def test_files_of_a_run(finished: Finished):
    folder = finished.folder / "run"
    names = {"metrics": "metrics.jsonl", "plot": "loss.png", "samples": "samples.jsonl"}
    names |= {name: name for name in ("checkpoints", "adapter", "merged")}
    assert finished.result.paths == {key: folder / name for key, name in names.items()}
    assert all(path.exists() for path in finished.result.paths.values())
    assert config.from_json((folder / "config.json").read_text()) == finished.config
    assert list((folder / "tensorboard").iterdir())
    assert sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*")) == ["2", "4"]
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in (folder / "merged").iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"),
    }


def test_metrics_of_a_run(finished: Finished):
    rows = finished.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    for row in rows:
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
        assert row["skipped"] == row["bad_steps"] == 0
        assert row["tokens_per_second"] > 0 and row["mfu"] > 0 and row["grad_norm"] > 0
        assert 0 <= row["padding_ratio"] < 0.5 and 0 <= row["accuracy"] <= 1
    result = finished.result
    assert result.steps == 4
    assert result.metrics["loss"] == rows[-1]["loss"]
    measured = [row for row in finished.rows("eval") if "loss" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert measured[1]["loss"] < measured[0]["loss"]
    assert result.metrics["eval_loss"] == measured[1]["loss"]
    exact = [row["step"] for row in finished.rows("eval") if "exact_match" in row]
    assert exact == [0, 4] and 0 <= result.metrics["eval_exact_match"] <= 1


def test_samples_of_a_run(finished: Finished):
    lines = finished.result.paths["samples"].read_text().splitlines()
    assert len(lines) == 2
    assert set(json.loads(lines[0])) == {"prompt", "reference", "answer", "answer_before"}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:llama as a Hugging Face folder with tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny = open_checkpoint("tiny:llama")
    loaded = oracle.load(tiny)
    tokenizer = data.load_tokenizer("tiny:llama")
    save_model(folder, loaded.params, tiny, loaded.weights, loaded.stacks, tokenizer=tokenizer)
    return folder


def torch_eval_loss(model: Any, finished: Finished) -> float:
    """The held-out loss as transformers computes it, row by row without packing."""
    import torch

    tokenizer = data.load_tokenizer("tiny:llama")
    _, held_out = data.load(finished.config.data, tokenizer, seed=0, vocab_size=259)
    assert held_out is not None
    total = weight = 0.0
    for row in held_out.rows:
        tokens = torch.tensor(row.tokens)[None].long()
        labels = torch.tensor(np.where(row.trained, row.tokens, -100))[None].long()
        with torch.no_grad():
            loss = model.eval()(input_ids=tokens, labels=labels).loss
        total += loss.item() * row.trained.sum()
        weight += row.trained.sum()
    return total / weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports_have_the_loss_that_training_measured(finished: Finished, base_folder: Path):
    import peft
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    merged = load(finished.result.paths["merged"])
    base = load(base_folder)
    before = torch_eval_loss(base, finished)
    adapted = peft.PeftModel.from_pretrained(base, finished.result.paths["adapter"])
    expected = finished.result.metrics["eval_loss"]
    assert torch_eval_loss(merged, finished) == pytest.approx(expected, rel=1e-5)
    assert torch_eval_loss(adapted, finished) == pytest.approx(expected, rel=1e-5)
    assert before > 1.05 * expected


def test_an_imported_adapter_goes_on(finished: Finished, capsys: pytest.CaptureFixture[str]):
    adapter = finished.folder / "renamed"
    adapter.mkdir()
    for path in finished.result.paths["adapter"].iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = "meta-llama/Llama-3.2-1B"
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    cfg = run_config(
        finished.folder,
        "continued",
        peft={"adapter": str(adapter), "rank": 16},
        optim={"learning_rate": 0.0},
        train={"num_steps": 1},
    )
    result = jaxtune.train(cfg)
    expected = finished.result.metrics["eval_loss"]
    assert result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert "was trained on 'meta-llama/Llama-3.2-1B'" in capsys.readouterr().err
    written = json.loads((result.paths["adapter"] / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 32)


def test_full_fine_tuning(tmp_path: Path):
    result = train(
        run_config(tmp_path, "run", peft={"method": "full", "rank": 16}, train={"num_steps": 3})
    )
    rows = [json.loads(line) for line in result.paths["metrics"].read_text().splitlines()]
    assert rows[2]["loss"] < rows[0]["loss"]
    assert set(result.paths) == {"metrics", "checkpoints", "merged"}
    merged, tiny = open_checkpoint(str(result.paths["merged"])), open_checkpoint("tiny:llama")
    assert set(merged.tensors) == set(tiny.tensors)
    assert all((merged.read(name) != tiny.read(name)).any() for name in tiny.tensors)


def test_other_numbers_of_a_resumed_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, now = (run_config(tmp_path, "run", train={"num_steps": n}) for n in (3, 5))
    path = tmp_path / "config.json"
    path.write_text(config.to_json(before))
    warn_of_changes(now, path)
    assert "train.num_steps was 3 and is 5 -" in capsys.readouterr().err
    warn_of_changes(before, path)
    warn_of_changes(now, tmp_path / "absent.json")
    assert not capsys.readouterr().err


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command in this process: options and changed sections -> exit code and stderr."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(*options: str, **sections: Any) -> tuple[int, str]:
        path = tmp_path / "config.json"
        path.write_text(config.to_json(run_config(tmp_path, "run", **sections)))
        arguments = [f"--config={path}", *(f"--config.{option}" for option in options)]
        monkeypatch.setattr(sys, "argv", ["jaxtune.train", *arguments])
        monkeypatch.setattr(os, "_exit", leave)
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = int(str(stop.code))
        return code, capsys.readouterr().err

    return run


def test_steps_that_are_not_finite_are_skipped(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXTUNE_TEST", "1")
    monkeypatch.setenv("JAXTUNE_FAULT", "step_pre@2=nan")
    code, err = command(train={"max_bad_steps": 2}, checkpoint={"every_steps": 1, "keep_last": 9})
    assert code == 0, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert rows[2]["learning_rate"] == pytest.approx(0.75e-2)


def test_many_steps_that_are_not_finite_stop_the_run(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXTUNE_TEST", "1")
    monkeypatch.setenv("JAXTUNE_FAULT", "step_pre=nan")
    code, err = command(train={"max_bad_steps": 2}, eval={"every_steps": 0})
    assert code == 5
    assert err.startswith("jaxtune: error: 2 steps in a row up to step 2 were not finite")
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "adapter").exists()


def assert_refused(outcome: tuple[int, str], code: int, *messages: str) -> None:
    """One line on stderr with an advice after a dash, and the exit code."""
    got, err = outcome
    assert got == code, err
    assert err.startswith("jaxtune: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert all(message in err for message in messages), err


def test_misspelt_key(command: Command):
    assert_refused(command("peft.rnk=8"), 2, "config.peft.rnk", "did you mean rank?")


def test_target_that_matches_nothing(command: Command):
    assert_refused(command("peft.target_modules=q_porj"), 2, "q_porj", "did you mean q_proj?")


def test_mesh_that_does_not_fit(command: Command):
    assert_refused(command("mesh.data=3"), 2, "8 devices")


def test_missing_data_file(tmp_path: Path, command: Command):
    absent = tmp_path / "trian.jsonl"
    assert_refused(command(f"data.train={absent}"), 3, f"{absent} does not exist")


def test_wrong_schema(tmp_path: Path, command: Command):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 3}\n')
    assert command(f"data.train={path}")[0] == 3
    assert f"{path}:2" in command(f"data.train={path}")[1]
    path.write_text('{"colour": "a", "shape": "b"}\n')
    code, err = command(f"data.train={path}")
    assert code == 3 and f"{path}:1" in err and "Traceback" not in err


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_data(tmp_path: Path, command: Command, content: str):
    path = tmp_path / ("rows.json" if content == "[]" else "rows.jsonl")
    path.write_text(content)
    assert_refused(command(f"data.train={path}"), 3, "empty")


def test_tokenizer_without_chat_template(tmp_path: Path, command: Command):
    tokenizer: Any = data.load_tokenizer("tiny:llama")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    outcome = command(f"model.tokenizer={tmp_path / 'tokenizer'}")
    assert_refused(outcome, 2, "chat template", "data.template")
    options = (f"model.tokenizer={tmp_path / 'tokenizer'}", "data.template=chatml")
    # Refused later, for another reason: the built-in template is enough.
    assert_refused(command(*options, "peft.target_modules=q_porj"), 2, "q_porj")


def test_absent_model(tmp_path: Path, command: Command):
    assert_refused(command(f"model.path={tmp_path / 'absent'}"), 4, "absent")
    assert_refused(command("model.path=tiny:lama"), 4, "lama", "llama")


def test_pickled_weights(base_folder: Path, tmp_path: Path, command: Command):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert_refused(command(f"model.path={model}"), 4, "pytorch_model.bin", "refused unread")


def copied(base_folder: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in base_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_truncated_weights(base_folder: Path, tmp_path: Path, command: Command):
    model = copied(base_folder, tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(command(f"model.path={model}"), 4, "model.safetensors")


def test_adapter_for_another_base(
    finished: Finished, base_folder: Path, tmp_path: Path, command: Command
):
    adapter = finished.result.paths["adapter"]
    model = copied(base_folder, tmp_path / "model")
    fields = json.loads((model / "config.json").read_text()) | {"intermediate_size": 80}
    (model / "config.json").write_text(json.dumps(fields))
    code, err = command(f"model.path={model}", f"peft.adapter={adapter}", "peft.rank=16")
    assert code == 4 and "wrong shape: base_model.model.model.layers.0.mlp.down_proj" in err
    assert "Traceback" not in err


def test_output_directory_behind_a_file(tmp_path: Path, command: Command):
    (tmp_path / "file").touch()
    outcome = command(f"train.output_dir={tmp_path / 'file' / 'run'}")
    assert_refused(outcome, 2, "a file is in the way")


def test_second_run_in_the_same_directory(tmp_path: Path, command: Command):
    with RunLock(tmp_path / "run"):
        assert_refused(command(), 76, f"process {os.getpid()}")


def test_checkpoint_that_is_not_there(command: Command):
    outcome = command("checkpoint.resume=7")
    assert_refused(outcome, 4, "7")


def test_process_ends_with_the_code(tmp_path: Path):
    command = [sys.executable, "-m", "jaxtune.train"]
    wrong = subprocess.run([*command, "--config=absent.py"], cwd=ROOT, capture_output=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(b"jaxtune: error: --config=absent.py: no such file")
    assert b"Traceback" not in wrong.stderr
    traced = subprocess.run(
        [*command, "--config=absent.py", "--debug"], cwd=ROOT, capture_output=True
    )
    assert traced.returncode == 2 and b"Traceback" in traced.stderr
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True)
    assert shown.returncode == 0 and b"--config.peft.rank=16" in shown.stdout
