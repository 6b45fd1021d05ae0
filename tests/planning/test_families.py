"""A published size of every family has a plan for TPUs: the rows of tools/bench/plan_table.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from jaxtune import models

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "bench" / "plan_table.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("plan_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load()


def test_every_family_has_a_row():
    assert TABLE.FAMILIES.keys() == models.FAMILIES.keys()
    for name, (_, model, *_) in TABLE.FAMILIES.items():
        family, _, size = model.partition(":")
        assert family == name and size in models.family(name).SIZES


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_step_of_a_published_size_fits(family: str):
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    row = TABLE.measure(family)
    assert "error" not in row, row["error"]
    assert row["exit_code"] == 0 and row["total"] < row["limit"]
    assert row["parameters"] > row["trained"] > 0 and row["unread_loops"] == []
    assert row["estimate"]["step_seconds"] >= row["peak_seconds"]
