"""Every real file loads, with as many rows as its NOTICE says."""

import re
from collections import Counter

import pytest

from jaxtune.data.examples import KINDS
from jaxtune.data.locations import Source
from jaxtune.data.records import convert
from jaxtune.data.rows import BadRow, Record
from jaxtune.data.sources import read
from jaxtune.schema import Data
from tests.data.conftest import SHARED

CONVERSATIONS, PREFERENCES, RATED, *_ = KINDS.values()
# What the rows are; None where they are no training data (questions without answers) or need
# their fields renamed.
KIND = {
    "chat": CONVERSATIONS,
    "preference/dpo_en_demo.json": PREFERENCES,
    "preference/dpo_zh_demo.json": PREFERENCES,
    "preference/kto_en_demo.json": RATED,
    "eval/mt_bench_question.jsonl": None,
    "eval/mt_bench_reference_gpt-4.jsonl": None,
    "eval/truthfulqa_a.csv": None,
    "eval": CONVERSATIONS,
    "sft/dataset_info.json": None,
    "sft/self_instruct_seed_tasks.jsonl": None,
    "sft": CONVERSATIONS,
    "srctgt": CONVERSATIONS,
    "text": CONVERSATIONS,
}


def notice() -> dict[str, int]:
    """Rows of each file, as NOTICE.md lists them."""
    path = SHARED / "NOTICE.md"
    if not path.exists():
        return {}
    rows = re.findall(r"^\| `([^`]+)` \| \d+ \| (\d+) \|", path.read_text(encoding="utf-8"), re.M)
    return {name: int(count) for name, count in rows}


def kind_of(name: str) -> str | None:
    return KIND[name] if name in KIND else KIND[name.partition("/")[0]]


def test_every_file_loads_with_its_number_of_rows():
    files = notice()
    if not files:
        pytest.skip("the shared data are not here")
    assert len(files) >= 25
    for name, count in files.items():
        rows = list(read(SHARED / name, 8 << 20))
        assert all(isinstance(row, Record) for row in rows), name
        if name == "sft/dataset_info.json":  # one object, whose fields are the entries
            assert len(rows[0].fields) == count
        else:
            assert len(rows) == count, name
        if (kind := kind_of(name)) is not None:
            source = Source(name, ())
            made = Counter(
                str(row) if isinstance(row, BadRow) else KINDS[type(row)]
                for row in convert(rows, source, Data())
            )
            assert made == {kind: count}, name


def test_a_table_with_renamed_columns():
    path = SHARED / "eval" / "truthfulqa_a.csv"
    if not path.exists():
        pytest.skip("the shared data are not here")
    columns = {"instruction": "Question", "output": "Best Answer"}
    rows = list(convert(read(path, 1 << 20), Source("", (), columns=columns), Data()))
    assert len(rows) == 419 and {type(row) for row in rows} <= set(KINDS)
