"""The list of files: what it flushes, finds and leaves to others."""

from pathlib import Path

import pytest

from jaxtune.checkpoint import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b").write_bytes(b"")
    (tmp_path / "commit_success.txt").write_bytes(b"now")
    return tmp_path


def test_whole_folder(folder: Path) -> None:
    assert manifest.write(folder) == 10
    assert manifest.write(folder) == 10
    for verify in ("full", "size", "off"):
        assert manifest.find_damage(folder, verify) is None
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("content", "full", "size"),
    (
        (b"0123456780", "a: checksum differs", None),
        (b"01234", "a: 5 bytes instead of 10", "a: 5 bytes instead of 10"),
        (None, "a: missing", "a: missing"),
    ),
)
def test_damage(folder: Path, content: bytes | None, full: str, size: str | None) -> None:
    manifest.write(folder)
    (folder / "a").unlink()
    if content is not None:
        (folder / "a").write_bytes(content)
    assert manifest.find_damage(folder, "full") == full
    assert manifest.find_damage(folder, "size") == size
    assert manifest.find_damage(folder, "off") is None


def test_copy_without_the_object_store_marker_is_whole(folder: Path) -> None:
    manifest.write(folder)
    (folder / "commit_success.txt").unlink()
    assert manifest.find_damage(folder, "full") is None


@pytest.mark.parametrize(
    "text", (b"", b"{", b"[]", b'{"files": 1}', b'{"files": {"a": 3}}', b"\xff")
)
def test_unreadable_manifest(folder: Path, text: bytes) -> None:
    (folder / manifest.NAME).write_bytes(text)
    damage = manifest.find_damage(folder, "full")
    assert damage is not None and damage.startswith("manifest.json: not readable")
