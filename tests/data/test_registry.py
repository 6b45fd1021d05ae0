"""LLaMA-Factory's dataset_info.json; rows and counts are compared with its own in test_oracles."""

import json
from pathlib import Path

import pytest

from jaxtune.data import load, locations
from jaxtune.data.records import convert, sources_of
from jaxtune.data.registry import read_registry, source_of
from jaxtune.data.rows import BadRow
from jaxtune.data.sources import read
from jaxtune.errors import ConfigError, DataError
from jaxtune.schema import Data
from tests.data.conftest import SHARED

TURNS = [{"who": "customer", "says": "q"}, {"who": "clerk", "says": "a"}]
TAGS = {
    "role_tag": "who",
    "content_tag": "says",
    "user_tag": "customer",
    "assistant_tag": "clerk",
}
ENTRIES = {
    "plain": ({}, {"instruction": "q", "input": "", "output": "a", "system": "not mapped"}),
    "columns": (
        {"columns": {"prompt": "ask", "response": "say", "system": "sys"}},
        {"ask": "q", "say": "a", "sys": None, "input": "not mapped"},
    ),
    "tags": (
        {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": TAGS},
        {"talk": TURNS},
    ),
    "openai": (
        {
            "formatting": "openai",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    "samples": ({"num_samples": 5}, {"instruction": "q", "output": "a"}),
}


@pytest.fixture
def registry(tmp_path):
    """Writes a registry of one entry a file, and the files."""
    entries = {}
    for name, (entry, row) in ENTRIES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row, row]))
        entries[name] = {"file_name": f"{name}.json", **entry}
    entries["far"] = {"ms_hub_url": "x/y"}
    entries["images"] = {"file_name": "plain.json", "columns": {"images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return str(tmp_path / "dataset_info.json")


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(registry, name, byte_tokenizer):
    cfg = Data(train=(name,), registry=registry)
    dataset, _ = load(cfg, byte_tokenizer, seed=0, vocab_size=259)
    assert len(dataset.rows) == (5 if name == "samples" else 2)
    for example in dataset.examples:
        assert [m[:2] for m in example.messages] == [("user", "q"), ("assistant", "a")]


def test_entries_that_cannot_be_read(registry):
    with pytest.raises(DataError, match="plin is no entry of .*did you mean plain.*; .* does not"):
        sources_of(Data(train=("plin",), registry=registry), "train")
    for name, why in (("far", "ms_hub_url"), ("images", "columns.images")):
        with pytest.raises(DataError, match=f"{name} has {why}, which cannot be read"):
            sources_of(Data(train=(name,), registry=registry), "train")
    with pytest.raises(DataError, match="cannot read data.registry"):
        read_registry(registry + "x")
    for entry, why in (
        ("plain.json", "'plain.json', no object"),
        ({"columns": [1]}, "columns=.1."),
    ):
        with pytest.raises(DataError, match=why):
            source_of("odd", {"odd": entry}, Path(registry).parent)


def test_what_is_no_entry_is_found_as_without_a_registry(registry, monkeypatch):
    pattern = str(Path(registry).parent / "pl*.json")
    (source,) = sources_of(Data(train=(pattern,), registry=registry), "train")
    assert [file.name for file in source.files] == ["plain.json"]
    monkeypatch.setattr(locations, "_download", lambda name, revision: Path(registry).parent)
    (source,) = sources_of(Data(train=("org/name",), registry=registry), "train")
    assert len(source.files) == len(ENTRIES)


def test_null_is_absent(registry):
    entry = {"file_name": "plain.json", "columns": None, "tags": None, "num_samples": None}
    source = source_of("plain", {"plain": entry}, Path(registry).parent)
    assert source == source_of(
        "plain", {"plain": {"file_name": "plain.json"}}, source.files[0].parent
    )


def test_renamed_columns_without_a_registry(write_rows, byte_tokenizer):
    path = write_rows([{"Question": "q", "Best Answer": "a", "input": "not mapped"}])
    cfg = Data(train=(path,), columns=("instruction=Question", "output=Best Answer"))
    (example,) = load(cfg, byte_tokenizer, seed=0, vocab_size=259)[0].examples
    assert [m.content for m in example.messages] == ["q", "a"]
    with pytest.raises(DataError, match="Question: is missing"):
        load(
            Data(train=(write_rows([{"output": 1}]),), columns=cfg.columns),
            byte_tokenizer,
            seed=0,
            vocab_size=259,
        )
    with pytest.raises(ConfigError, match="data.columns='output': write field=column"):
        sources_of(Data(train=(path,), columns=("output",)), "train")


LOCAL = {
    "identity": 91,
    "c4_demo": 300,
    "glaive_toolcall_en_demo": 300,
    "glaive_toolcall_zh_demo": 300,
    "dpo_en_demo": 299,
    "dpo_zh_demo": 300,
    "kto_en_demo": 300,
}


@pytest.mark.parametrize("name", LOCAL)
def test_entries_of_the_real_file(tmp_path, name):
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    entries = read_registry(str(SHARED / "sft" / "dataset_info.json"))
    (tmp_path / entries[name]["file_name"]).symlink_to(
        next(path for path in SHARED.rglob(entries[name]["file_name"]))
    )
    source = source_of(name, entries, tmp_path)
    rows = list(convert(read(source.files[0], 8 << 20), source, Data()))
    assert len(rows) == LOCAL[name] and not any(isinstance(row, BadRow) for row in rows)
