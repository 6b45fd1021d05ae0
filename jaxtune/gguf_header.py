"""The header of a GGUF file: its metadata, and where its tensors lie.

It is parsed here rather than by the `gguf` package: ten times faster on a vocabulary of 50
thousand, without mapping the file, with limits against bloated files, and truncation is an error
that says so.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxtune.errors import WeightError

MAX_ENTRIES = 100_000
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_LENGTH = 1 << 24
MAX_RANK = 8
# Value types of the format: struct codes of the scalars, then string and array.
_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Entry(NamedTuple):
    """A stored tensor: its quantization type, shape (outermost axis first) and first byte."""

    kind: int
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata by key and tensors by name, in the order of the file.

    Raises:
        WeightError: not a GGUF file of version 2 or 3, truncated, damaged, or over the limits.
    """
    try:
        with open(path, "rb") as file:
            return _parse(path, file)
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror} - check the path") from error
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise damaged(path, f"unreadable header ({error})") from error


def damaged(path: Path, what: str) -> WeightError:
    """The error for a file whose contents contradict themselves."""
    return WeightError(f"{path} is damaged: {what} - download or copy the file again")


def _parse(path: Path, file: BinaryIO) -> tuple[dict[str, Any], dict[str, Entry]]:
    if file.read(4) != b"GGUF":
        raise WeightError(f"{path} is not a GGUF file (bad magic) - download the file again")
    (version,) = _unpack(file, "I")
    if version not in (2, 3):
        raise WeightError(
            f"{path} is GGUF version {version}; jaxtune reads 2 and 3 (little-endian) - "
            "convert it with a current llama.cpp"
        )
    num_tensors, num_keys = _unpack(file, "QQ")
    if max(num_tensors, num_keys) > MAX_ENTRIES:
        raise damaged(path, f"{num_tensors} tensors and {num_keys} keys (limit {MAX_ENTRIES})")
    metadata = {}
    for _ in range(num_keys):
        key = _string(file)
        metadata[key] = _value(file, *_unpack(file, "I"))
    infos = {}
    for _ in range(num_tensors):
        stored = _string(file)
        (rank,) = _unpack(file, "I")
        if rank > MAX_RANK:
            raise struct.error(f"a tensor of {rank} axes")
        shape = _unpack(file, f"{rank}Q")[::-1]
        infos[stored] = (shape, *_unpack(file, "IQ"))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise struct.error(f"general.alignment={align!r}")
    start = -(-file.tell() // align) * align
    return metadata, {
        stored: Entry(kind, shape, start + offset)
        for stored, (shape, kind, offset) in infos.items()
    }


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > MAX_STRING_BYTES:
        raise struct.error(f"a string of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise struct.error("truncated")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    kind, length = _unpack(file, "IQ")
    if length > MAX_ARRAY_LENGTH:
        raise struct.error(f"an array of {length} values")
    if kind in _SCALARS:
        return list(_unpack(file, f"{length}{_SCALARS[kind]}"))
    if kind != _STRING:
        raise struct.error("nested arrays")
    return [_string(file) for _ in range(length)]
