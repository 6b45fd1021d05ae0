"""The folder of checkpoints: which steps it holds, and how they leave it.

A finished step is a real directory named by its number with a manifest in it. Whatever else is
there (empty folders, links, files, half-written steps) is never taken for one. Steps leave by one
rename into `.trash`, so that no half-deleted step can be listed.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from jaxtune.checkpoint import manifest

TRASH = ".trash"
PARTIAL = ".tmp"


def partial(folder: Path, step: int) -> Path:
    """Where a step is written before it is finished."""
    return folder / f"{step}{PARTIAL}"


def numbered(folder: Path) -> list[int]:
    """Real, non-empty directories that have a step's name, ascending: finished or not."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if _is_number(path.name))
    real = (path for path in paths if path.is_dir() and not path.is_symlink())
    return sorted(int(path.name) for path in real if any(path.iterdir()))


def finished(folder: Path) -> list[int]:
    """Steps with a manifest, ascending; their contents are not checked."""
    return [step for step in numbered(folder) if (folder / str(step) / manifest.NAME).is_file()]


def oddities(folder: Path) -> list[str]:
    """Names of what is neither a step nor a leftover of ours."""
    if not folder.is_dir():
        return []
    known = {str(step) for step in numbered(folder)} | {TRASH}
    return sorted(p.name for p in folder.iterdir() if p.name not in known and not _is_partial(p))


def clean(folder: Path) -> None:
    """Removes what a killed run left behind; the caller holds the run's lock."""
    for path in folder.iterdir():
        if path.name == TRASH or _is_partial(path):
            shutil.rmtree(path)


def finish(folder: Path, step: int) -> None:
    """Gives a completely written step its name; what has that name already steps aside."""
    final = folder / str(step)
    if step in finished(folder):  # damaged, or of an abandoned line
        _discard(folder, step)
    elif os.path.lexists(final):  # not ours
        final.rename(folder / f"{step}.set-aside-{time.time_ns()}")
    partial(folder, step).rename(final)
    manifest.sync_folder(folder)


def remove_partial(folder: Path, step: int) -> None:
    """Removes what a failed save wrote."""
    path = partial(folder, step)
    for _ in range(20):  # tensorstore may go on writing for a moment
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def keep_only(folder: Path, keep: Iterable[int]) -> None:
    """Takes all other finished steps out of the list; `empty_trash` then frees their space."""
    for step in set(finished(folder)) - set(keep):
        _discard(folder, step)


def empty_trash(folder: Path) -> None:
    """Deletes what was taken out of the list."""
    shutil.rmtree(folder / TRASH, ignore_errors=True)


def _discard(folder: Path, step: int) -> None:
    trash = folder / TRASH
    trash.mkdir(exist_ok=True)
    (folder / str(step)).rename(trash / f"{step}-{time.time_ns()}")


def _is_partial(path: Path) -> bool:
    return path.suffix == PARTIAL and _is_number(path.stem) and path.is_dir()


def _is_number(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))
