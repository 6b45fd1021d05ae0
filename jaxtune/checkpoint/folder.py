"""An exported folder appears under its name only when it is complete.

It is written beside its final place and renamed. Every export carries `jaxtune_export.json`, by
which a later export knows that it may replace the folder; other folders with files in them are left
alone.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.manifest import sync_folder
from jaxtune.errors import ConfigError, StorageError

RECORD_FILE = "jaxtune_export.json"


@contextlib.contextmanager
def replace_folder(
    final: Path, record: Mapping[str, Any], *, source: Path | None = None
) -> Iterator[Path]:
    """Yields a new folder that becomes `final` when the block ends without an error.

    Args:
        final: its place; replaced if it is empty or an earlier export.
        record: what was exported; kept in the folder.
        source: the model that is exported, which `final` must not touch.

    Raises:
        ConfigError: `final` holds files that are not an export, is a file, or touches `source`.
        StorageError: the disk is full or not writable; nothing is left under `final`.
    """
    final = Path(os.path.abspath(final))
    _refuse(final, source)
    temporary = final.with_name(f".{final.name}.jaxtune-tmp")
    previous = final.with_name(f".{final.name}.jaxtune-old")
    try:
        _clean(final, temporary, previous)  # after an export that was killed
        temporary.mkdir(parents=True)
        yield temporary
        (temporary / RECORD_FILE).write_text(json.dumps(dict(record), indent=2) + "\n")
        sync_folder(temporary)
        if final.exists():
            final.rename(previous)
        temporary.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write {final}: {reason} - free space there or choose another folder"
        ) from error
    finally:
        _clean(final, temporary, previous)


def _refuse(final: Path, source: Path | None) -> None:
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{final} is a file - choose another folder for the export")
    if source is not None and source.exists():
        inside, model = final.resolve(), source.resolve()
        if inside == model or model in inside.parents or inside in model.parents:
            raise ConfigError(f"{final} lies inside the model {source} - choose another folder")
    if final.exists() and any(final.iterdir()) and not (final / RECORD_FILE).exists():
        raise ConfigError(
            f"{final} holds files that jaxtune did not export - choose another folder or empty it"
        )


def _clean(final: Path, temporary: Path, previous: Path) -> None:
    if previous.exists() and not final.exists():
        previous.rename(final)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
