import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxtune.log import Log, every_few_seconds, plot_losses, read_rows
from jaxtune.schema import Log as LogConfig

PLAIN = LogConfig(progress="plain", tensorboard=False, plot=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = Log(PLAIN, tmp_path, 0, 4)
    log.write(1, "train", {"loss": 2.5, "perplexity": 12.2, "learning_rate": 1e-3, "mfu": 0.25})
    log.write(2, "eval", {"loss": math.inf, "exact_match": 0.5})
    log.write(3, "train", {"loss": math.nan, "skipped": 1.0})
    assert log.plot() == {}
    log.close()
    assert rows(tmp_path) == [
        {
            **{"step": 1, "split": "train", "loss": 2.5, "perplexity": 12.2},
            **{"learning_rate": 1e-3, "mfu": 0.25},
        },
        {"step": 2, "split": "eval", "loss": None, "exact_match": 0.5},
        {"step": 3, "split": "train", "loss": None, "skipped": 1.0},
    ]
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "train step 1/4  loss 2.5000  ppl 12.2  lr 1.00e-03  mfu 25.0%"
    assert second == "eval step 2/4  loss inf  exact match 0.500"
    assert "SKIPPED (not finite)  eta 0:0" in third


def test_rows_of_a_lost_run_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 4, "sp')
    log = Log(PLAIN, tmp_path, 2, 4)
    log.write(3, "train", {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_write_that_fails_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = Log(PLAIN, tmp_path, 0, 4)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (1, 2):
        log.write(step, "train", {"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.err.count("warning: metrics.jsonl cannot be written") == 1
    assert len(captured.out.splitlines()) == 2


def test_off_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = Log(LogConfig(progress="off", tensorboard=False, plot=False), tmp_path, 0, 4)
    log.write(1, "train", {"loss": 1.0})
    assert capsys.readouterr().out == "" and len(rows(tmp_path)) == 1


def test_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = Log(LogConfig(progress="bar", tensorboard=False, plot=False), tmp_path, 0, 2)
    log.write(1, "train", {"loss": 1.25})
    log.write(1, "eval", {"loss": 1.5})
    log.say("[not a style]")
    log.write(2, "train", {"loss": 1.0})
    log.close()
    out = capsys.readouterr().out
    assert "2/2" in out and "loss 1.0000" in out
    assert "eval step 1/2  loss 1.5000" in out and "[not a style]" in out


def test_tensorboard(tmp_path: Path):
    log = Log(LogConfig(progress="off", plot=False), tmp_path, 0, 2)
    log.write(1, "train", {"loss": 1.25})
    log.write(2, "train", {"loss": 1.0})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.read_bytes().count(b"train/loss") == 2


def test_plot(tmp_path: Path):
    log = Log(LogConfig(progress="off", tensorboard=False), tmp_path, 0, 2)
    for step in (1, 2):
        log.write(step, "train", {"loss": 2.0 - step})
    log.write(2, "eval", {"loss": math.nan})
    assert log.plot() == {"plot": tmp_path / "loss.png"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing(tmp_path: Path):
    plot_losses(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_rows_of_no_file(tmp_path: Path):
    assert read_rows(tmp_path / "absent.jsonl") == []


def test_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    report = every_few_seconds("loading")
    for done in range(1, 8):
        now += 0.7
        report(done, 7)
    assert capsys.readouterr().out == "loading: 3 of 7\nloading: 6 of 7\n"
