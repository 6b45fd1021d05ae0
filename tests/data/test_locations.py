import json
from pathlib import Path

import pytest

from jaxtune.data.locations import files_of
from jaxtune.errors import DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def found(name, split="train"):
    return [path.name for path in files_of(str(name), split)]


def test_files_and_patterns(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl", "deep/c.jsonl", "d.txt")
    assert found(tmp_path / "a.jsonl") == ["a.jsonl"]
    assert found(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    with pytest.raises(DataError, match="no file matches .*x"):
        found(tmp_path / "*.x")


LAYOUTS = {
    "paddlenlp": (["train.json", "dev.json"], ["train.json"], ["dev.json"]),
    "paddlenlp-folders": (
        ["train/b.json", "train/a.json", "dev/c.json"],
        ["a.json", "b.json"],
        ["c.json"],
    ),
    "hub": (
        [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["validation-00000-of-00001.parquet"],
    ),
    "texts": (["b.txt", "a.md", "more/c.jsonl.gz", ".hidden/x.txt", "run.py"], None, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders(tmp_path, layout):
    names, train, held_out = LAYOUTS[layout]
    touch(tmp_path, *names)
    if train is None:
        assert found(tmp_path) == ["a.md", "b.txt", "c.jsonl.gz"]
        with pytest.raises(DataError, match="holds no split, not dev or validation"):
            found(tmp_path, "eval")
    else:
        assert found(tmp_path) == train and found(tmp_path, "eval") == held_out


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        found(tmp_path)
    touch(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match="did you mean .*train.jsonl"):
        found(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="holds train.jsonl"):
        found(tmp_path / "zzz")
    with pytest.raises(DataError, match="there is no folder"):
        found(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match="holds train, not dev or validation"):
        found(tmp_path, "eval")


def test_saved_datasets(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "state.json").write_text("{}")
    assert found(tmp_path / "one") == ["one"]
    (tmp_path / "both" / "train").mkdir(parents=True)
    (tmp_path / "both" / "test").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert found(tmp_path / "both") == ["train"] and found(tmp_path / "both", "eval") == ["test"]


def test_hub_ids_come_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repository = tmp_path / "datasets--some--rows"
    touch(repository / "snapshots" / commit, "data/train-0.parquet", "data/test-0.parquet")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert found("some/rows") == ["train-0.parquet"]
    assert found("some/rows@main", "eval") == ["test-0.parquet"]
    with pytest.raises(DataError, match="other/rows is neither a local file nor a data set"):
        found("other/rows")
    assert not Path("some").exists()
