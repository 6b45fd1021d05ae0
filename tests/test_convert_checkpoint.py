from pathlib import Path

import numpy as np
import pytest

from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import WeightError
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


def test_folder_that_is_not_orbax(tmp_path: Path):
    with pytest.raises(WeightError, match="not written by to_orbax"):
        convert_checkpoint.to_hf(tmp_path, tmp_path / "out", None, 5.0)
