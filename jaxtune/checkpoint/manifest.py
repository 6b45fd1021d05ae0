"""The list of a finished folder's files with sizes and checksums, written last.

A folder with `manifest.json` was written completely. On restore the list shows a flipped byte,
which orbax and tensorstore read without complaint. Checksums are sha256: it is in the standard
library, and current processors compute it faster than disks read.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"
# Orbax's marker for object stores: copies often lack it, and reading does not need it.
IGNORED = frozenset({"commit_success.txt"})


def write(folder: Path) -> int:
    """Flushes every file and directory below `folder` to disk and lists them in its manifest.

    Returns:
        The total size of the files in bytes.

    Raises:
        OSError: a file cannot be read or flushed, or the manifest cannot be written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.name not in IGNORED and path != folder / NAME:
            files[path.relative_to(folder).as_posix()] = _digest(path, sync=True)
    write_synced(folder / NAME, json.dumps({"files": files}, indent=1).encode())
    return sum(entry["size"] for entry in files.values())


def find_damage(folder: Path, verify: str) -> str | None:
    """Compares `folder` with its manifest.

    Args:
        folder: a folder that `write` finished.
        verify: "full" (sizes and checksums), "size", or "off".

    Returns:
        The first problem as `file: cause`, or None.
    """
    if verify == "off":
        return None
    try:
        files = json.loads((folder / NAME).read_bytes())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name}: missing"
            if path.stat().st_size != expected["size"]:
                return f"{name}: {path.stat().st_size} bytes instead of {expected['size']}"
            if verify == "full" and _digest(path)["sha256"] != expected["sha256"]:
                return f"{name}: checksum differs"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME}: not readable ({type(error).__name__}: {error})"
    return None


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, flushes it, renames it and flushes its folder."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a directory's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path, sync: bool = False) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest}
