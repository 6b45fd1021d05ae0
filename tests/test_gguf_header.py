import struct
from pathlib import Path

import pytest

from jaxtune.errors import WeightError
from jaxtune.gguf_header import Entry, read_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def scalar(key: str, kind: int, code: str, value: float) -> bytes:
    return string(key) + struct.pack(f"<I{code}", kind, value)


def array(key: str, kind: int, length: int, values: bytes) -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, length) + values


def tensor(name: str, *axes: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, 0, 64)


def write(path: Path, keys: list[bytes], tensors: list[bytes]) -> Path:
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    path.write_bytes(start + b"".join([*keys, *tensors]))
    return path


def test_values_and_tensors(tmp_path: Path):
    keys = [
        string("name") + struct.pack("<I", 8) + string("ünknown"),
        scalar("small", 1, "b", -3),
        scalar("flag", 7, "?", True),
        scalar("large", 10, "Q", 1 << 63),
        scalar("general.alignment", 4, "I", 64),
        array("half", 6, 2, struct.pack("<2f", 0.5, -1.5)),
        array("words", 8, 2, string("a") + string("")),
    ]
    path = write(tmp_path / "m.gguf", keys, [tensor("w", 3, 5), tensor("b")])
    metadata, entries = read_header(path)
    assert metadata == {
        "name": "ünknown",
        "small": -3,
        "flag": True,
        "large": 1 << 63,
        "general.alignment": 64,
        "half": [0.5, -1.5],
        "words": ["a", ""],
    }
    start = -(-path.stat().st_size // 64) * 64
    assert entries == {"w": Entry(0, (5, 3), start + 64), "b": Entry(0, (), start + 64)}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ([string("k") + struct.pack("<IQ", 8, 1 << 40)], [], "a string of 1099511627776 bytes"),
        ([array("k", 4, 1 << 40, b"")], [], "an array of 1099511627776 values"),
        ([array("k", 9, 1, struct.pack("<IQ", 4, 0))], [], "nested arrays"),
        ([string("k") + struct.pack("<I", 99)], [], "99"),
        ([string("k") + struct.pack("<IQ", 8, 1) + b"\xff"], [], "codec"),
        ([string("k") + struct.pack("<IQ", 8, 5) + b"abc"], [], "truncated"),
        ([scalar("general.alignment", 4, "I", 0)], [], "alignment=0"),
        ([], [tensor("w", *[1] * 9)], "a tensor of 9 axes"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, keys: list[bytes], tensors: list[bytes], message: str):
    path = write(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(WeightError, match=f"m.gguf is damaged: unreadable header.*{message}"):
        read_header(path)
