"""Tokenized files on disk, shared by runs and processes.

An entry is a folder named by a hash of everything that its content follows from: the files, the
options, the tokenizer and the code that makes rows. It appears under its name by a rename, when it
is whole; while one process makes it the others wait at a lock.
"""

import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtune.data import formats, sources, table
from jaxtune.data.labelling import Labelling
from jaxtune.data.locations import Source
from jaxtune.data.table import Tokenized
from jaxtune.log import warn
from jaxtune.schema import Data

# Fields of schema.Data that change nothing in the rows of a file.
NOT_IN_ROWS = (
    *("train", "eval", "eval_fraction", "packing", "packer", "isolated", "pad_to"),
    *("loss_weights", "shuffle", "prefetch", "allow_change", "cache", "workers"),
    *("streaming", "shuffle_units"),
    *("mix", "weights", "repeats", "max_samples"),
)


def tokenized(
    found: Sequence[Source],
    cfg: Data,
    tokenizer: Any,
    make: Callable[[Path], None],
    meaning: Labelling | str | None = None,
) -> Tokenized:
    """The table of some sources: from the cache, or made now and kept there.

    Args:
        found: the sources.
        cfg: how they become rows, and where the cache is.
        tokenizer: with its chat template.
        make: writes the table into an empty folder.
        meaning: of rows that are no conversations or texts: how they are labelled, or "pairs".
    """
    root = _folder(cfg.cache)
    if root is None:
        # The files stay readable while they are mapped, though their names are gone.
        with tempfile.TemporaryDirectory(prefix="jaxtune-tokens-") as folder:
            make(Path(folder))
            return table.read(Path(folder))
    entry = root / _key(found, cfg, tokenizer, meaning)
    with _lock(entry.with_suffix(".lock")):
        try:
            return table.read(entry)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            warn(f"{entry} is damaged ({error}); its files are tokenized again")
        shutil.rmtree(entry, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=entry.name[:8], dir=root) as folder:
            part = Path(folder) / "part"
            part.mkdir()
            make(part)
            part.rename(entry)
        return table.read(entry)


def tokenizer_identity(tokenizer: Any) -> str:
    """sha256 of what a tokenizer and its chat template do."""
    text = tokenizer.backend_tokenizer.to_str() + repr(tokenizer.special_tokens_map)
    return hashlib.sha256(f"{text}{tokenizer.chat_template}".encode()).hexdigest()


def row_options(cfg: Data) -> dict[str, Any]:
    """The options that the rows of a file follow from, and the text behind data.function."""
    names = {field.name for field in dataclasses.fields(cfg)}.difference(NOT_IN_ROWS)
    text = cfg.function and formats.row_function_source(cfg.function)
    return {name: getattr(cfg, name) for name in sorted(names)} | {"function_text": text}


def _folder(name: str | None) -> Path | None:
    """The folder of the cache, which exists; None if there is to be none."""
    if name == "":
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxtune" / "tokens"
    folder = Path(name or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        problem = "not writable"
    except OSError as error:
        problem = error.strerror
    warn(f"data.cache={folder}: {problem}; tokenized data are not kept")
    return None


def _key(
    found: Sequence[Source], cfg: Data, tokenizer: Any, meaning: Labelling | str | None
) -> str:
    files = [file for source in found for file in source.files]
    parts = row_options(cfg)
    parts |= {"sources": list(found), "files": sources.hash_files(files), "code": _code()}
    parts |= {"cuts": cfg.cuts_examples, "tokenizer": tokenizer_identity(tokenizer)}
    parts["meaning"] = meaning
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """sha256 of this folder's modules: other code may make other rows."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process; waits while another process has it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
