"""LLaMA-Factory's dataset_info.json, read as it is: names of data sets -> sources.

Keys of an entry (its documentation, data/README.md of version 0.9.5): one of hf_hub_url, file_name
(ms_hub_url, om_hub_url, script_url and cloud_file_name are refused); formatting, ranking, subset,
split, folder, num_samples, columns, tags. `columns` and `tags` say how the file calls what
LLaMA-Factory calls prompt, query, response ...; once one is given, the others have no default.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.data.fields import parsed
from jaxtune.data.locations import Source, files_in, files_of
from jaxtune.data.rows import RowError
from jaxtune.errors import DataError

# LLaMA-Factory's name of a column -> ours, and its default where an entry has no `columns`.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
SHARED = ("system", "tools", "history", "chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
REFUSED = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
# Our words -> LLaMA-Factory's tag that renames them, and the role behind it.
TAGS = {"role_tag": "from", "content_tag": "value"}
ROLE_TAGS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read_registry(path: str) -> dict[str, Any]:
    """The entries of a dataset_info.json.

    Raises:
        DataError: it is missing or no JSON object.
    """
    try:
        entries = json.loads(Path(path).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read data.registry={path}: {error} - check the file") from error
    if not isinstance(entries, dict):
        raise DataError(f"data.registry={path} is no object of data sets - check the file")
    return entries


def source_of(name: str, entries: Mapping[str, Any], folder: Path) -> Source:
    """The source that an entry describes.

    Args:
        name: of an entry.
        entries: of the registry.
        folder: of the registry; file names are relative to it.

    Raises:
        DataError: the entry is malformed, or needs something that cannot be read.
    """
    entry = entries[name]
    if not isinstance(entry, dict):
        raise DataError(
            f'data.registry: {name} is {entry!r}, no object - write "{name}": {{"file_name": ...}}'
        )
    entry = {key: value for key, value in entry.items() if value is not None}
    for key in ("columns", "tags"):
        if not isinstance(entry.get(key, {}), dict):
            raise DataError(
                f"data.registry: {key}={entry[key]!r} of {name} is no object - write "
                "LLaMA-Factory's names and the file's, or leave it out"
            )
    columns = entry.get("columns", {})
    problems = [key for key in REFUSED if key in entry and "hf_hub_url" not in entry]
    problems += [f"columns.{key}" for key in MEDIA if columns.get(key)]
    if problems or not ({"hf_hub_url", "file_name"} & set(entry)):
        why = ", ".join(problems) or "no file_name"
        raise DataError(f"data.registry: {name} has {why}, which cannot be read - use local files")
    return Source(
        name=name,
        files=_files(entry, folder),
        format=_format(entry),
        columns=_columns(entry),
        tags=entry.get("tags", {}),
        num_samples=entry.get("num_samples"),
    )


def _files(entry: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    split = entry.get("split", "train")
    if "hf_hub_url" not in entry:
        return files_of(str(folder / entry["file_name"]), split)
    files = files_of(entry["hf_hub_url"], split)
    part = entry.get("folder") or entry.get("subset")
    chosen = tuple(file for file in files if part is None or part in file.parts)
    return chosen or files_in(files[0].parent / str(part), split)


def _format(entry: Mapping[str, Any]) -> str:
    """Ours of an entry's formatting; auto where the fields decide (ranking, kto_tag)."""
    if entry.get("ranking"):
        return "preference"
    columns = entry.get("columns", {})
    if columns.get("kto_tag"):
        return "rated"
    if entry.get("formatting", "alpaca") == "alpaca":
        has_answer = not columns or columns.get("response")
        return "alpaca" if has_answer else "text"
    return "sharegpt"


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each field -> the file's."""
    names = ALPACA if entry.get("formatting", "alpaca") == "alpaca" else SHAREGPT
    given = entry.get("columns")
    if given is None:
        return {ours: ours for ours in names.values()}
    names = names | {name: name for name in SHARED}
    if _format(entry) == "text":
        names = {"prompt": "text"}
    return {names[key]: column for key, column in given.items() if key in names and column}


def rename(fields: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The fields of a row under our names.

    Raises:
        RowError: a renamed column is missing from the row.
    """
    if not source.columns:
        return dict(fields)
    for column in source.columns.values():
        if column not in fields and column not in ("input", *SHARED):
            raise RowError(column, "is missing")
    row = {ours: fields[theirs] for ours, theirs in source.columns.items() if theirs in fields}
    if not source.tags:
        return row
    for name in ("conversations", "chosen", "rejected"):
        turns = parsed(row.get(name), name)
        if isinstance(turns, list):
            row[name] = [_retag(turn, source.tags) for turn in turns]
        elif isinstance(turns, dict):
            row[name] = _retag(turns, source.tags)
    return row


def _retag(turn: Any, tags: Mapping[str, str]) -> Any:
    """A turn with ShareGPT's words in place of the file's."""
    if not isinstance(turn, dict):
        return turn
    words = {tags.get(tag, ours): ours for tag, ours in TAGS.items()}
    roles = {tags.get(tag, ours): ours for tag, ours in ROLE_TAGS.items()}
    renamed = {words.get(key, key): value for key, value in turn.items()}
    role = renamed.get("from")
    return {**renamed, "from": roles.get(role, role) if isinstance(role, str) else role}
