import hashlib
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as library

from jaxtune.checkpoint.safetensors import read_folder, read_header, read_tensor, write_folder
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import WeightError


def file_bytes(header: dict | bytes, data: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(folder: Path, arrays: dict[str, np.ndarray], **options: int) -> None:
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    write_folder(folder, tensors, arrays.__getitem__, **options)


def samples() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "f32": random.normal(size=(3, 5)).astype(np.float32),
        "f16": random.normal(size=(7,)).astype(np.float16),
        "f64": random.normal(size=(2, 2)),
        "bf16": random.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32),
        "i64": random.integers(-9, 9, (3,)),
        "bool": np.array([True, False, True]),
        "view": random.normal(size=(6, 4)).astype(np.float32).T,
    }


def test_reads_what_the_library_writes(tmp_path: Path):
    arrays = {name: np.ascontiguousarray(array) for name, array in samples().items()}
    library.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    located = read_folder(tmp_path)
    assert set(located) == set(arrays)
    for name, array in arrays.items():
        read = read_tensor(located[name])
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_library_reads_what_we_write(tmp_path: Path):
    write(tmp_path, samples())
    read = library.load_file(tmp_path / "model.safetensors")
    for name, array in samples().items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_round_trip(tmp_path: Path, dtype: type):
    array = np.random.default_rng(0).normal(size=(4, 6)).astype(dtype)
    write(tmp_path, {"w": array})
    read = read_tensor(read_folder(tmp_path)["w"])
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read.view(np.uint8), array.view(np.uint8))


def test_shards(tmp_path: Path):
    arrays = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    write(tmp_path, arrays, max_shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 5 * 400
    assert not list(tmp_path.glob("*.tmp"))
    located = read_folder(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_tensor(located[name]), array)


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


OK = file_bytes({"a": entry("F32", [2, 3], 0, 24), "b": entry("F32", [2], 24, 32)}, bytes(32))
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10\x00", "not a safetensors file"),
    "truncated header": (OK[:40], "truncated"),
    "truncated data": (OK[:-5], "bytes long"),
    "trailing bytes": (OK + b"xx", "bytes long"),
    "header of 2^60 bytes": ((1 << 60).to_bytes(8, "little") + OK[8:], "limit 16 MB"),
    "not json": (file_bytes(b"{nonsense}", b""), "not valid JSON"),
    "not utf-8": (file_bytes(b'{"\xff\xfe": 1}', b""), "not valid JSON"),
    "nested": (file_bytes(b'{"a":' + b"[" * 100_000, b""), "not valid JSON"),
    "offset beyond": (file_bytes({"a": entry("F32", [10], 0, 40)}, bytes(8)), "bytes long"),
    "overlap": (
        file_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "overlap",
    ),
    "gap": (
        file_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20)),
        "gap",
    ),
    "reversed": (file_bytes({"a": entry("F32", [2], 8, 0)}, bytes(8)), "gap or overlap"),
    "shape overflow": (
        file_bytes({"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, bytes(8)),
        "its shape needs",
    ),
    "negative shape": (file_bytes({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)), "bad shape"),
    "unknown dtype": (file_bytes({"a": entry("F4", [2], 0, 8)}, bytes(8)), "does not read"),
    "duplicate": (
        file_bytes(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "duplicate",
    ),
    "missing field": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, b""), "bad header entry"),
    "entry is a list": (file_bytes({"a": [1, 2]}, b""), "bad header entry"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "numpy": (b"\x93NUMPY" + bytes(100), "numpy file"),
    "tar": (bytes(257) + b"ustar" + bytes(100), "tar archive"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(tmp_path: Path, case: str):
    content, reason = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_header_limits(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    many = {f"t{i}": entry("F32", [0], 0, 0) for i in range(100_001)}
    path.write_bytes(file_bytes(many, b""))
    with pytest.raises(WeightError, match="100001 tensors"):
        read_header(path)
    path.write_bytes(file_bytes(b"{" + b" " * (90 << 20), b""))
    start = time.perf_counter()
    with pytest.raises(WeightError, match="limit 16 MB"):
        read_header(path)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickle_is_refused_unread(tmp_path: Path, name: str):
    sentinel = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Evil(sentinel)))
    with pytest.raises(WeightError, match="safetensors"):
        read_folder(tmp_path)
    assert not sentinel.exists()


def sharded(folder: Path) -> Path:
    arrays = {f"t{i}": np.full((10,), i, np.float32) for i in range(3)}
    write(folder, arrays, max_shard_bytes=40)
    return folder / "model.safetensors.index.json"


def edit_index(index: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_index_with_a_missing_shard(tmp_path: Path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match="model-00002-of-00003.safetensors is missing"):
        read_folder(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_index_that_leaves_the_folder(tmp_path: Path, shard: str):
    index = sharded(tmp_path)
    edit_index(index, lambda weight_map: weight_map.update(t1=shard))
    with pytest.raises(WeightError, match="only plain names"):
        read_folder(tmp_path)


def test_index_that_misplaces_a_tensor(tmp_path: Path):
    index = sharded(tmp_path)
    edit_index(
        index, lambda weight_map: weight_map.update(t1=weight_map["t0"], t9=weight_map["t2"])
    )
    with pytest.raises(WeightError) as caught:
        read_folder(tmp_path)
    assert "t9 is not in" in str(caught.value)


def test_tensor_in_two_shards(tmp_path: Path):
    sharded(tmp_path)
    first = tmp_path / "model-00001-of-00003.safetensors"
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(WeightError, match="t0 is in model-00001.* and in model-00002"):
        read_folder(tmp_path)


def test_unreadable_index(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightError, match="no readable weight_map"):
        read_folder(tmp_path)


def test_shards_without_an_index(tmp_path: Path):
    sharded(tmp_path).unlink()
    with pytest.raises(WeightError, match="unfinished"):
        read_folder(tmp_path)


def test_a_byte_that_changes_on_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arrays = {"a": np.arange(8, dtype=np.float32), "b": np.ones(4, np.float32)}
    replace = Path.replace

    def replace_and_flip(self: Path, target: Path) -> Path:
        content = bytearray(self.read_bytes())
        content[-1] ^= 1
        self.write_bytes(content)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_and_flip)
    with pytest.raises(WeightError, match="read back differ"):
        write(tmp_path, arrays)


def test_file_that_shrinks_while_read(tmp_path: Path):
    write(tmp_path, {"a": np.ones(100, np.float32)})
    located = read_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightError, match="10 bytes early"):
        read_tensor(located["a"])


def test_same_tensors_make_the_same_file(tmp_path: Path):
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, samples())
        content = (tmp_path / name / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
    assert digests[0] == digests[1]
