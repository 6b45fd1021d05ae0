"""Writes the reference page of all options, docs/config.md, from jaxtune/schema.py.

python tools/docs.py            writes the page
python tools/docs.py --check    exits with 1 if the page differs from what would be written
"""

import dataclasses
import sys
import typing
from pathlib import Path

from jaxtune import schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

HEADER = """\
# Options

<!-- Written by tools/docs.py from jaxtune/schema.py; change the schema, then run `make docs`. -->

Every option is `section.field`. A config file sets it as `c.section.field = value`, the command
line as `--config.section.field=value`; values separated by commas make a list. A key that is not
listed here, a value of the wrong type and a value out of range are refused before anything is
loaded. The resolved options of a run are saved in its folder as `config.json`.
"""


def type_name(annotation: object) -> str:
    """Short readable name of a field's type: `int`, `text or none`, `list of text`."""
    names = {str: "text", int: "integer", float: "number", bool: "true/false", type(None): "none"}
    if annotation in names:
        return names[typing.cast(type, annotation)]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return f"list of {type_name(arguments[0])}"
    return " or ".join(type_name(argument) for argument in arguments)


def default_text(value: object) -> str:
    """The default as a reader would type it; nothing for none and the empty list."""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else ""


def range_text(metadata: typing.Mapping[str, typing.Any]) -> str:
    """The allowed values: choices, or inclusive bounds."""
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def escaped(text: str) -> str:
    """Text that Markdown would otherwise take for a tag or the end of a table cell."""
    return text.replace("<", "&lt;").replace("|", "\\|")


def section_text(name: str, section: type) -> str:
    """One section as a heading, its sentence and a table of its fields."""
    rows = [
        f"| `{name}.{field.name}` | {type_name(field.type)} | {default_text(field.default)} "
        f"| {range_text(field.metadata)} | {escaped(field.metadata['doc'])} |"
        for field in dataclasses.fields(section)
    ]
    head = "| option | type | default | allowed | meaning |\n|---|---|---|---|---|"
    return "\n".join([f"## {name}", "", section.__doc__ or "", "", head, *rows, ""])


def page() -> str:
    """The whole reference page."""
    sections = [section_text(name, section) for name, section in schema.sections().items()]
    return "\n".join([HEADER, *sections])


def main() -> None:
    """Writes the page, or compares it with the file."""
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print("docs/config.md is stale: run `make docs` and commit it")
            sys.exit(1)
        return
    if sys.argv[1:]:
        sys.exit("usage: python tools/docs.py [--check]")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
