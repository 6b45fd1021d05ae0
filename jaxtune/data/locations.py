"""What `data.train` and `data.eval` name -> the files of each source.

rows.jsonl, data/*.parquet      a file, or all files that a pattern matches
folder                          one that `datasets.save_to_disk` wrote, or a folder of files:
                                train.json, train/*, train-*.parquet for training, dev or
                                validation for held-out rows (PaddleNLP and Hugging Face
                                layouts, also below data/); else every data file in it
org/name, org/name@revision     a data set of the Hugging Face hub, downloaded to its cache
an entry of data.registry       see registry.py
"""

import difflib
import glob
import re
from dataclasses import dataclass, field
from pathlib import Path

from jaxtune.data.tables import is_saved, is_saved_splits
from jaxtune.errors import DataError

SPLITS = {"train": ("train",), "eval": ("dev", "validation", "valid", "val", "eval", "test")}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow", ".txt", ".md")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval.

    Attributes:
        name: as it is written there.
        files: what it stands for, in order.
        format: of its rows, as data.format.
        columns: our name of a field -> the file's; empty: the fields are called as we call them.
        tags: ShareGPT's words -> the file's (see registry.py).
        num_samples: rows to draw from it, None: all.
    """

    name: str
    files: tuple[Path, ...]
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None


def files_of(name: str, split: str, revision: str | None = None) -> tuple[Path, ...]:
    """The files that a name stands for.

    Args:
        name: a path, a pattern or a hub id.
        split: "train" or "eval" (decides between the files of a folder), or a split's own name.
        revision: of a hub id, where the name gives none.

    Raises:
        DataError: there are none.
    """
    place = Path(name).expanduser()
    if place.is_file():
        return (place,)
    if place.is_dir():
        return files_in(place, split)
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(place), recursive=True))
        files = tuple(path for path in found if path.is_file() or is_saved(path))
        if not files:
            raise DataError(f"no file matches {name} - check the pattern")
        return files
    if (hub := _HUB_ID.fullmatch(name)) and not place.parent.is_dir():
        return files_in(_download(hub[1], hub[2] or revision), split)
    raise DataError(f"data file {name} does not exist{_neighbours(place)}")


def files_in(folder: Path, split: str) -> tuple[Path, ...]:
    """The files of a folder that belong to a split, or all where none is named after a split.

    Raises:
        DataError: there are none.
    """
    names = SPLITS.get(split, (split,))
    if is_saved_splits(folder) and any((folder / name).is_dir() for name in names):
        return (next(folder / name for name in names if (folder / name).is_dir()),)
    if is_saved(folder):
        return (folder,)
    files = sorted(path for path in folder.rglob("*") if _is_data(path, folder))
    by_split = {_split_of(path.relative_to(folder)) for path in files}
    for name in names:
        if name in by_split:
            return tuple(p for p in files if _split_of(p.relative_to(folder)) == name)
    if not files:
        raise DataError(f"{folder} holds no data files ({', '.join(SUFFIXES)}, .gz) - name a file")
    known = {name for row in SPLITS.values() for name in row}
    if by_split & known or split != "train":
        held = ", ".join(sorted(by_split & known)) or "no split"
        raise DataError(f"{folder} holds {held}, not {' or '.join(names)} - name its files")
    return tuple(files)


def _is_data(path: Path, folder: Path) -> bool:
    """Whether a file of a folder holds rows: neither hidden nor about the data."""
    inside = path.relative_to(folder)
    is_hidden = any(part.startswith((".", "_")) for part in inside.parts)
    is_about = path.name.lower() in ("readme.md", "license.txt", "dataset_info.json")
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    is_kind = bool(suffixes) and suffixes[-1].lower() in SUFFIXES
    return path.is_file() and is_kind and not is_hidden and not is_about


def _split_of(inside: Path) -> str:
    """The word that a file's name, or else its folder, begins with: train-0001.jsonl is train."""
    words = [re.split(r"[-_.]", part, maxsplit=1)[0] for part in (inside.name, inside.parent.name)]
    known = {name for row in SPLITS.values() for name in row}
    return next((word for word in words if word in known), words[0])


def _neighbours(place: Path) -> str:
    """A hint for a path that does not exist: similar names beside it."""
    folder = place.parent
    if not folder.is_dir():
        return f" - there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(place.name, names, n=3, cutoff=0.5)
    if close:
        return f" - did you mean {' or '.join(str(folder / name) for name in close)}?"
    return f" - {folder} holds {', '.join(names[:8]) or 'nothing'}"


def _download(name: str, revision: str | None) -> Path:
    """The local snapshot of a data set of the hub."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}{more}" for suffix in SUFFIXES for more in ("", ".gz")]
    try:
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # the client raises many types, its HTTP library's among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} is neither a local file nor a data set that can be had from the hub: {reason} "
            "- check the name, `hf auth login` for gated ones, or give local files"
        ) from error
