"""Size gates: how long files and functions may be, and how many arguments a function may take.

    python tools/sizes.py        lists what is too large; exit code 1 if anything is

A file over the limit wants to be two files, a function over it two functions. Kernels (files
named pallas_* below jaxtune/ops) get more room because a kernel cannot be split freely, and the
schema does because it is a table: every option once, in one place.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, KERNEL_FILE_LINES, SCHEMA_FILE_LINES = 400, 600, 800
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 80, 150
ARGUMENTS, KERNEL_ARGUMENTS = 10, 16  # a kernel's arguments are its operands
CONFIG_LINES = 40
README_LINES = 250
SCHEMA = Path("jaxtune/schema.py")
PYTHON_FOLDERS = ("jaxtune", "tools", "configs", "launch", "tests")


def is_kernel(path: Path) -> bool:
    """True for jaxtune/ops/<op>/pallas_<platform>.py."""
    return path.name.startswith("pallas_") and "ops" in path.parts


def oversized_functions(path: Path, tree: ast.AST) -> Iterator[str]:
    """Yields one line per function of a parsed file that is too long or takes too much."""
    limit = KERNEL_FUNCTION_LINES if is_kernel(path) else FUNCTION_LINES
    most = KERNEL_ARGUMENTS if is_kernel(path) else ARGUMENTS
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > limit:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, limit {limit}"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = sum(a.arg not in ("self", "cls") for a in arguments)
        if count > most:
            yield f"{path}:{node.lineno}: {node.name} takes {count} arguments, limit {most}"


def oversized(root: Path) -> list[str]:
    """Returns one line per file or function below `root` that breaks a gate."""
    problems = []
    for path in sorted(p for folder in PYTHON_FOLDERS for p in (root / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(root)
        lines = len(source.splitlines())
        limit = KERNEL_FILE_LINES if is_kernel(name) else FILE_LINES
        if name.parts[0] == "configs":
            limit = CONFIG_LINES
        elif name == SCHEMA:
            limit = SCHEMA_FILE_LINES
        if lines > limit:
            problems.append(f"{name}: {lines} lines, limit {limit}")
        problems += oversized_functions(name, ast.parse(source, str(path)))
    readme = root / "README.md"
    lines = len(readme.read_text(encoding="utf-8").splitlines()) if readme.exists() else 0
    if lines > README_LINES:
        problems.append(f"README.md: {lines} lines, limit {README_LINES}")
    return problems


def main() -> None:
    """Prints what is too large and exits with 1 if anything is."""
    problems = oversized(ROOT)
    print("\n".join(problems) or "sizes: all within limits")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
