"""Writes docs/config.md from jaxtune/schema.py, and the table in docs/models.md from the families.

python tools/docs.py            writes the pages
python tools/docs.py --check    exits with 1 if a page differs from what would be written
"""

import dataclasses
import re
import sys
import typing
from pathlib import Path

from jaxtune import schema
from jaxtune.models.__main__ import families

DOCS = Path(__file__).resolve().parent.parent / "docs"

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


def models_page() -> str:
    """The page of models with a fresh table of families."""
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    rows = ["| model_type | | positions | one tensor in files | sizes |", "|---|---|---|---|---|"]
    for family in families():
        fused, sizes = (
            ", ".join(f"`{x}`" for x in names) for names in (family.fused, family.sizes)
        )
        rows.append(
            f"| `{family.name}` | {family.about} | {family.positions} | {fused} | {sizes} |"
        )
    table = "\n".join(rows)
    return re.sub(r"(<!-- families.*?-->\n).*?(<!-- end -->)", rf"\1{table}\n\2", text, flags=re.S)


def pages() -> dict[Path, str]:
    """Each page with generated text, as it should be."""
    return {DOCS / "config.md": page(), DOCS / "models.md": models_page()}


def stale() -> list[str]:
    """Names of pages that differ from what would be written."""
    return [path.name for path, text in pages().items() if path.read_text("utf-8") != text]


def main() -> None:
    """Writes the pages, or compares them with the files."""
    if sys.argv[1:] == ["--check"]:
        if old := stale():
            sys.exit(f"docs: {', '.join(old)} differ from their source: run `make docs`")
        return
    if sys.argv[1:]:
        sys.exit("usage: python tools/docs.py [--check]")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
