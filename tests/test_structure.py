"""The project's own order: generated pages, configs, tables, sizes and declared dependencies."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from jaxtune import config, schema
from tools import docs, sizes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxtune"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def choices(section: str, field: str) -> set[str]:
    """The allowed values of an option, without `auto`."""
    return set(schema.sections()[section].__dataclass_fields__[field].metadata["choices"]) - {
        "auto"
    }


def test_generated_pages_are_fresh():
    assert docs.stale() == [], "run `make docs`"


def test_every_option_has_a_sentence():
    for name, section in schema.sections().items():
        assert section.__doc__, name
        for field in section.__dataclass_fields__.values():
            assert len(field.metadata["doc"]) > 5, f"{name}.{field.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_resolves(path: Path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    command = re.search(rf"python -m jaxtune.train --config={path.relative_to(ROOT)}.*", doc)
    assert command, "a config file shows the command that runs it"
    overrides = shlex.split(command[0])[4:]
    resolved = config.parse_arguments([f"--config={path}", *overrides])
    assert resolved.model.path != schema.RunConfig().model.path
    named = {text.partition("=")[2] for text in overrides}
    files = {*resolved.data.train, *resolved.data.eval} - named
    assert all(Path(file).exists() for file in files)


def test_every_family_has_a_row_and_the_four_parts():
    from jaxtune import models

    shared = {
        "__init__",
        "__main__",
        "base",
        "block",
        "decoder",
        "deepseek_layout",
        "llama_layout",
        "moe_layout",
        "tables",
    }
    shared |= {"encoder", "bert_layout", "heads", "encoder_decoder", "t5_layout"}
    files = {path.stem for path in (PACKAGE / "models").glob("*.py")} - shared
    assert set(models.FAMILIES.values()) == files
    for name, module in models.FAMILIES.items():
        family = importlib.import_module(f"jaxtune.models.{module}")
        assert models.family(name) is family
        assert family.TINY["model_type"] == name
        assert callable(family.build)
        weights = family.weights(family.Config.from_hf(family.TINY))
        ours = [row.ours for row in weights]
        theirs = [row.hf for row in weights if row.columns is None]
        assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)


@pytest.mark.parametrize(
    ("table", "option"),
    [
        ("jaxtune.data.formats:FORMATS", ("data", "format")),
        ("jaxtune.data.packing:PACKERS", ("data", "packer")),
        ("jaxtune.ops.attention:IMPLEMENTATIONS", ("model", "attention")),
        ("jaxtune.objectives:OBJECTIVES", ("objective", "name")),
        ("jaxtune.optim:OPTIMIZERS", ("optim", "name")),
    ],
)
def test_options_offer_the_rows_of_their_table(table: str, option: tuple[str, str]):
    module, name = table.split(":")
    assert set(getattr(importlib.import_module(module), name)) == choices(*option)


def test_every_adapter_method_has_a_row():
    from jaxtune import peft

    files = {path.stem for path in (PACKAGE / "peft").glob("*.py")}
    files -= {
        "__init__",
        "base",
        "encoders",
        "beside",
        "combine",
        "dora_embedding",
        "embedding",
        "patterns",
        "split",
        "targets",
    }
    assert set(peft.METHODS) == files == choices("peft", "method")


def test_readme_names_what_exists():
    from jaxtune import models

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {*models.FAMILIES, *choices("peft", "method"), *choices("data", "format")}
    missing = {name for name in named | choices("objective", "name") if f"`{name}`" not in text}
    assert not missing, f"README's support table lacks {missing}"


def test_readme_map_names_existing_files_and_all_of_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The map")[1].split("```")[1]
    package = tree.split("jaxtune/\n")[1].split("\nconfigs/")[0]
    named = set(re.findall(r"(\w+(?:\.py|/))", package))
    actual = {
        path.name + ("/" if path.is_dir() else "")
        for path in PACKAGE.iterdir()
        if (path.is_dir() and any(path.glob("*.py"))) or path.suffix == ".py"
    }
    assert named == actual - {"__init__.py"}


def test_nothing_is_oversized():
    assert sizes.oversized(ROOT) == []


def test_size_gates_see_what_is_too_large(tmp_path: Path):
    (tmp_path / "jaxtune" / "ops" / "dot").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    long_function = "def f():\n" + "    x = 1\n" * 100
    (tmp_path / "jaxtune" / "a.py").write_text(long_function + "x = 1\n" * 300)
    (tmp_path / "jaxtune" / "ops" / "dot" / "pallas_tpu.py").write_text(
        long_function + "x = 1\n" * 300
    )
    (tmp_path / "jaxtune" / "b.py").write_text("def g(self, a, b, c, d, e, f, g, h, i, j): ...\n")
    (tmp_path / "jaxtune" / "c.py").write_text("def h(a, b, c, d, e, f, g, h, *, i, j, k): ...\n")
    (tmp_path / "configs" / "d.py").write_text("x = 1\n" * 41)
    assert sizes.oversized(tmp_path) == [
        "configs/d.py: 41 lines, limit 40",
        "jaxtune/a.py: 401 lines, limit 400",
        "jaxtune/a.py:1: f has 101 lines, limit 80",
        "jaxtune/c.py:1: h takes 11 arguments, limit 10",
    ]


def imported_packages() -> dict[str, set[str]]:
    """Top-level packages that the package's files import, and the files that do."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {k: v for k, v in found.items() if k not in sys.stdlib_module_names | {"jaxtune"}}


def test_imports_and_dependencies_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[>=\[]", line)[0].lower() for line in project["dependencies"]}
    names = {"orbax": "orbax-checkpoint"}
    imported = {
        names.get(k, k.replace("_", "-")).lower(): v for k, v in imported_packages().items()
    }
    undeclared = {name: files for name, files in imported.items() if name not in declared}
    assert not undeclared
    optional_for_transformers = {"protobuf", "sentencepiece"}
    assert declared - set(imported) == optional_for_transformers
