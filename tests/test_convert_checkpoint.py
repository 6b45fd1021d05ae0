import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import load_tokenizer
from jaxtune.errors import ConfigError, WeightError
from tests.checkpoint import states
from tools import convert_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bitwise_equal(tmp_path: Path, dtype: str):
    convert_checkpoint.to_orbax("tiny:llama", tmp_path / "orbax")
    convert_checkpoint.to_hf(tmp_path / "orbax", tmp_path / "hf", dtype, 5.0)
    convert_checkpoint.to_orbax(str(tmp_path / "hf"), tmp_path / "orbax2")
    convert_checkpoint.to_hf(tmp_path / "orbax2", tmp_path / "hf2", None, 0.00002)
    first, second = (open_checkpoint(str(tmp_path / name)) for name in ("hf", "hf2"))
    tiny = open_checkpoint("tiny:llama")
    assert set(first.tensors) == set(second.tensors) == set(tiny.tensors)
    assert {info.dtype.name for info in second.tensors.values()} == {dtype}
    for name in first.tensors:
        np.testing.assert_array_equal(first.read(name), second.read(name))
        if dtype == "float32":
            np.testing.assert_array_equal(first.read(name), tiny.read(name))
    assert (tmp_path / "hf2" / "tokenizer.json").exists()
    assert len(list((tmp_path / "hf2").glob("*.safetensors"))) > 1


def test_inspect_lists_every_tensor(capsys: pytest.CaptureFixture[str]):
    convert_checkpoint.inspect("tiny:llama")
    output = capsys.readouterr().out
    assert "model_type: llama" in output
    assert "model.layers.2.mlp.down_proj.weight  float32[32, 64]" in output


@pytest.mark.parametrize("part", ["params", "source.json"])
def test_damaged_orbax_folder(tmp_path: Path, part: str):
    convert_checkpoint.to_orbax("tiny:llama", tmp_path / "orbax")
    files = [path for path in (tmp_path / "orbax").rglob("*") if path.is_file()]
    largest = max((p for p in files if part in p.parts), key=lambda path: path.stat().st_size)
    states.damage(largest, "flip")
    with pytest.raises(WeightError, match="orbax"):
        convert_checkpoint.to_hf(tmp_path / "orbax", tmp_path / "out", None, 5.0)
    assert not (tmp_path / "out").exists()


def test_what_reads_back_differently_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = convert_checkpoint._read_params

    def changed(folder: Path, abstract: dict) -> dict:
        params = read(folder, abstract)
        return params | {"norm.scale": params["norm.scale"].at[3].add(1e-3)}

    monkeypatch.setattr(convert_checkpoint, "_read_params", changed)
    with pytest.raises(WeightError, match="reads back differently"):
        convert_checkpoint.to_orbax("tiny:llama", tmp_path / "orbax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to_hf", "a", "b", "--max_shard_gb=0"], "max_shard_gb=0"),
        (["to_hf", "a", "b", "--max_shard_gb=nan"], "max_shard_gb=nan"),
        (["inspect", "tiny:llama", "--revision=main"], "revision=main is for hub ids"),
        (["to_orbax", "tiny:llama", "a", "--revision=v1"], "revision=v1 is for hub ids"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint.main()


def test_folder_that_is_not_orbax(tmp_path: Path):
    with pytest.raises(WeightError, match="not written by to_orbax"):
        convert_checkpoint.to_hf(tmp_path, tmp_path / "out", None, 5.0)


@pytest.mark.parametrize("model", ["tiny:llama", "tiny:gpt2", "tiny:gptj"])
def test_added_tokens_start_as_the_mean(tmp_path: Path, model: str):
    convert_checkpoint.add_tokens(model, tmp_path / "out", ["<a>", "<b>"], special=True)
    old, new = open_checkpoint(model), open_checkpoint(str(tmp_path / "out"))
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert new.config == old.config | {"vocab_size": len(tokenizer)}
    assert tokenizer.convert_tokens_to_ids("<b>") == len(tokenizer) - 1
    grown = {name for name, info in new.tensors.items() if info != old.tensors[name]}
    heads = {"tiny:llama": {"lm_head.weight"}, "tiny:gptj": {"lm_head.weight", "lm_head.bias"}}
    assert len(grown) == 1 + len(heads.get(model, ())) and heads.get(model, set()) <= grown
    for name in new.tensors:
        rows, before = new.read(name), old.read(name)
        np.testing.assert_array_equal(rows[: len(before)], before)
        for row in rows[len(before) :]:
            np.testing.assert_allclose(row, before.mean(axis=0), atol=1e-6)


def test_tokens_that_are_there_are_not_added(tmp_path: Path):
    convert_checkpoint.add_tokens("tiny:llama", tmp_path / "out", ["<a>"], special=False)
    with pytest.raises(ConfigError, match="has them all"):
        again = str(tmp_path / "out")
        convert_checkpoint.add_tokens(again, tmp_path / "again", ["<a>"], special=False)
