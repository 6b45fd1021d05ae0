"""Reads and writes safetensors files, one tensor at a time.

A file is: 8 bytes header length (little-endian), a JSON header {name: {dtype, shape,
data_offsets}}, then the data. The header is checked in full before anything is read: limits against
bloated files, no gaps, overlaps or trailing bytes, sizes that fit shapes. A model is one file, or
several shards with an index that says which shard holds which tensor.

Source: https://huggingface.co/docs/safetensors (format); sharded index as transformers writes it.
Stricter than the format: headers of at most 16 MB and 100,000 tensors (its own limit is 100 MB).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.tensors import TensorInfo, as_bytes, read_array
from jaxtune.errors import ConfigError, WeightError, listing
from jaxtune.faults import fault

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5")
_MAGIC = (
    (b"PK\x03\x04", "a zip archive (PyTorch's pickle format)"),
    (b"\x93NUMPY", "a numpy file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (b"\x80", "a Python pickle"),
)


class Location(NamedTuple):
    """Where a tensor lies."""

    info: TensorInfo
    path: Path
    offset: int


def refuse_pickle(path: Path) -> None:
    """Raises `WeightError` for files that can only be opened by running code from them."""
    if path.suffix in _PICKLE_SUFFIXES:
        raise WeightError(
            f"{path} is not a safetensors file and is refused unread (pickled weights can run "
            "code) - use the model's safetensors version, or convert it with transformers: "
            "model.save_pretrained(folder)"
        )


def read_header(path: Path) -> dict[str, Location]:
    """Checks a file's header and returns its tensors in the order of their data.

    Raises:
        WeightError: not a safetensors file, truncated, over the limits, or inconsistent.
    """
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{":
                raise WeightError(_not_safetensors(path, start))
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"its header claims {length} bytes (limit 16 MB)")
            if length > size - 8:
                raise _damaged(path, f"truncated inside its header ({size} bytes)")
            file.seek(8)
            head = file.read(length)
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror} - check the path") from error
    entries = _parse_header(path, head)
    return _check_layout(path, entries, data_start=8 + length, file_size=size)


def _not_safetensors(path: Path, start: bytes) -> str:
    kind = next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
    if kind is None and start[257:262] == b"ustar":
        kind = "a tar archive"
    found = f"it looks like {kind}" if kind else "its header is not JSON"
    return f"{path} is not a safetensors file: {found} - download the file again"


def _damaged(path: Path, what: str) -> WeightError:
    return WeightError(f"{path} is damaged: {what} - download or copy the file again")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("duplicate names")
    return keys


def _parse_header(path: Path, head: bytes) -> list[tuple[str, TensorInfo, int, int]]:
    """The header's entries as (name, info, begin, end), sorted by begin."""
    try:
        header = json.loads(head.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"it lists {len(header)} tensors (limit {MAX_TENSORS})")
    entries = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = (*shape, begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"bad header entry for {name!r}") from error
        if any(type(number) is not int or number < 0 for number in numbers):
            raise _damaged(path, f"bad shape or offsets for {name!r}")
        if dtype not in DTYPES:
            raise WeightError(
                f"{path}: tensor {name!r} has dtype {dtype!r}, which jaxtune does not read - "
                f"use a version stored as one of {', '.join(list(DTYPES)[:6])}"
            )
        entries.append((name, TensorInfo(tuple(shape), DTYPES[dtype]), begin, end))
    return sorted(entries, key=lambda entry: (entry[2], entry[3]))


def _check_layout(
    path: Path,
    entries: list[tuple[str, TensorInfo, int, int]],
    *,
    data_start: int,
    file_size: int,
) -> dict[str, Location]:
    position = 0
    for name, info, begin, end in entries:
        if begin != position:
            raise _damaged(path, f"gap or overlap before tensor {name!r}")
        if end - begin != info.nbytes:
            raise _damaged(
                path, f"tensor {name!r} has {end - begin} bytes, its shape needs {info.nbytes}"
            )
        position = end
    if data_start + position != file_size:
        raise _damaged(
            path, f"{file_size} bytes long, but its header describes {data_start + position}"
        )
    return {name: Location(info, path, data_start + begin) for name, info, begin, _ in entries}


def read_folder(folder: Path) -> dict[str, Location]:
    """The tensors of a model folder: `model.safetensors`, or all shards of its index.

    Raises:
        WeightError: no weights, shards without an index, or an index that does not fit its shards.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    if index.exists():
        return _read_shards(folder, _read_index(index))
    others = sorted(path.name for path in folder.iterdir() if path.is_file())
    shards = [name for name in others if name.endswith(".safetensors")]
    if len(shards) == 1:
        return read_header(folder / shards[0])
    if shards:
        raise WeightError(
            f"{folder} holds {len(shards)} safetensors files but no {INDEX_FILE}: an unfinished "
            "download or export - fetch or export it again"
        )
    for name in others:
        refuse_pickle(folder / name)
    raise WeightError(f"{folder} holds no .safetensors file - give a Hugging Face model folder")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, f"no readable weight_map ({error})") from error
    for _, shard in pairs:
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise WeightError(
                f"{index} points to {shard!r}: only plain names of .safetensors files in the same "
                "folder are allowed - do not use this model"
            )
    return dict(pairs)


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, Location]:
    problems: list[str] = []
    tensors: dict[str, Location] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            problems.append(f"{shard} is missing")
            continue
        for name, location in read_header(folder / shard).items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].path.name} and in {shard}")
            tensors[name] = location
    if not problems:
        problems = [
            f"{name} is not in {shard}"
            for name, shard in weight_map.items()
            if name not in tensors or tensors[name].path.name != shard
        ]
    if problems:
        raise WeightError(
            f"{folder / INDEX_FILE} does not fit its shards - download or export the model again:"
            + listing(problems)
        )
    return tensors


def read_tensor(location: Location) -> np.ndarray:
    """Reads one tensor into a fresh array."""
    return read_array(location.path, location.offset, location.info)


def write_folder(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    stem: str = "model",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors to `<stem>.safetensors`, or to shards and an index, then checks the files.

    `read(name)` is called once per tensor, in the order of the mapping. Each file appears under its
    name only when complete; the index comes last.

    Raises:
        WeightError: what the files give back differs from what was written.
    """
    shards = _split(tensors, max_shard_bytes)
    count = len(shards)
    digests: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{count:05d}" if count > 1 else stem
        path = folder / f"{name}.safetensors"
        digests |= _write_file(path, {name: tensors[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, path.name)
    if count > 1:
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        fault("export_index")
        write_synced(folder / f"{stem}.safetensors.index.json", text.encode())
    _verify(folder, set(weight_map.values()), digests)


def read_along(
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], object],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Reads what `write_folder` reads, in its order, and writes nothing.

    It is what the other processes do while the first one writes arrays that all have to gather.
    """
    for names in _split(tensors, max_shard_bytes):
        for name in names:
            read(name)


def shard_bytes(gigabytes: float) -> int:
    """The option --max_shard_gb in bytes; ConfigError unless it is a size."""
    size = gigabytes * 1e9
    if not 0 < size < math.inf:
        raise ConfigError(f"max_shard_gb={gigabytes:g} is no size - give a number above 0")
    return int(size)


def _split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names of each file's tensors: wide dtypes first keeps all aligned to their own size."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return [sorted(names, key=lambda name: -tensors[name].dtype.itemsize) for names in shards]


def _write_file(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]
) -> dict[str, bytes]:
    """Writes one file; returns a digest of each tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        offsets = [position, position + info.nbytes]
        dtype = _DTYPE_NAMES[info.dtype]
        header[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": offsets}
        position = offsets[1]
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digests = {}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in tensors:
            array = np.asarray(read(name), order="C")
            assert (array.shape, array.dtype) == tensors[name], (name, array.shape, array.dtype)
            data = as_bytes(array)
            file.write(data)
            digests[name] = hashlib.sha256(data).digest()
        file.flush()
        os.fsync(file.fileno())
    fault("export_shard")
    temporary.replace(path)
    return digests


def _verify(folder: Path, files: set[str], digests: Mapping[str, bytes]) -> None:
    found: dict[str, Location] = {}
    for name in files:
        found |= read_header(folder / name)
    wrong = sorted(set(found) ^ set(digests))
    for name in sorted(set(found) & set(digests)):
        data = as_bytes(read_tensor(found[name]))
        if hashlib.sha256(data).digest() != digests[name]:
            wrong.append(name)
    if wrong:
        raise WeightError(
            f"{folder}: tensors read back differ from those written - check the disk, then "
            "export again:" + listing(wrong)
        )
