"""The demo's data files are what their generator makes, and fit to measure learning with."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ROOT / "tools" / "demo_data.py"


@pytest.fixture(scope="module")
def demo():
    """The generator as a module."""
    spec = importlib.util.spec_from_file_location("demo_data", GENERATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    lines = (ROOT / "configs" / "data" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return read("orders_train.jsonl")


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return read("orders_eval.jsonl")


def test_files_are_regenerated_byte_for_byte(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo_data.py"])
    demo.main()
    for name in ("orders_train.jsonl", "orders_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "configs" / "data" / name).read_bytes()


def test_check_mode_accepts_the_files_and_notices_a_change(demo, monkeypatch, tmp_path):
    subprocess.run([sys.executable, GENERATOR, "--check"], check=True, cwd=tmp_path)
    changed = (ROOT / "configs" / "data" / "orders_train.jsonl").read_bytes().replace(b"Road", b"")
    (tmp_path / "orders_train.jsonl").write_bytes(changed)
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo_data.py", "--check"])
    with pytest.raises(SystemExit, match="run it without --check"):
        demo.main()
    assert (tmp_path / "orders_train.jsonl").read_bytes() == changed


def test_sizes_and_disjoint_texts(demo, train, held_out):
    assert (len(train), len(held_out)) == (demo.TRAIN_ROWS, demo.EVAL_ROWS)
    texts = [row["messages"][1]["content"] for row in train + held_out]
    assert len(set(texts)) == len(texts)


def test_every_answer_is_json_with_the_same_fields_copied_from_the_text(train, held_out):
    for row in train + held_out:
        system, order, reply = row["messages"]
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        answer = json.loads(reply["content"])
        assert list(answer) == ["quantity", "item", "customer", "address", "day"]
        assert all(key in system["content"] for key in answer)
        assert type(answer["quantity"]) is int and 1 <= answer["quantity"] <= 12
        for field in ("item", "customer", "address", "day"):
            assert answer[field] and answer[field] in order["content"]


def test_a_third_of_the_held_out_values_is_new_in_every_word(train, held_out):
    training_text = json.dumps(train).lower()
    values = [json.loads(row["messages"][2]["content"]) for row in held_out]
    for field, telling in (
        ("item", slice(0, 2)),
        ("customer", slice(0, 2)),
        ("address", slice(1, 2)),
    ):
        parts = [value[field].lower().split()[telling] for value in values]
        new = [row for row in parts if not any(part in training_text for part in row)]
        assert len(new) >= len(values) / 3, field


def test_rows_that_training_has_seen_are_refused(demo, train, held_out):
    demo.check_rows(train, held_out)
    with pytest.raises(AssertionError, match="texts are in both"):
        demo.check_rows(train, held_out + train[:1])
    with pytest.raises(AssertionError, match="held-out values of item"):
        demo.check_rows(train[:100], train[100:])
