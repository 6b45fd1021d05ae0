"""Every command that the documentation shows is one that works.

Commands stand in ```sh blocks of README.md, CONTRIBUTING.md and docs/. Cheap ones run here; those
that install or train for minutes are the recipes of make targets, which CI runs (.ci/run).
"""

import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxtune import config, schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HARMLESS = ("cd", "git", "source", "ls", "cat", "tail", "tensorboard", "export")


def blocks(page: Path, language: str) -> list[str]:
    """Contents of a page's fenced blocks in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Words of every command line on a page, without comments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(re.sub(r"<[^>]*>", "X", part), comments=True)
        for line in lines
        for part in line.split("&&")
    ]
    return [w for w in words if w]


@functools.cache
def help_text(*command: str) -> str:
    """What a command prints with --help."""
    run = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_flags(command: tuple[str, ...], arguments: list[str]) -> None:
    """Every --flag of a command line appears in the command's help."""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            assert re.search(rf"{flag}\b", help_text(*command)), f"{command} has no {flag}"


def check_python(arguments: list[str]) -> None:
    """A call of the interpreter: one of our modules or tools, or an install step."""
    if arguments[0] == "-m" and arguments[1] in ("pip", "pytest", "venv"):
        check_make_runs(["python", *arguments])
    elif arguments[:2] == ["-m", "jaxtune.train"]:
        options = [a for a in arguments[2:] if a not in ("--help", "--debug")]
        assert not options or config.parse_arguments(options)
    elif arguments[0] == "-m" and arguments[1].startswith("jaxtune."):
        check_flags(("-m", arguments[1]), arguments[2:])
    else:
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"
        check_flags((arguments[0],), arguments[1:])


@functools.cache
def make_recipes() -> set[str]:
    """Command lines of the targets that CI runs, as `make -n` prints them."""
    printed = subprocess.run(
        ["make", "-n", "-B", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    text = printed.replace(" --quiet", "").replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines()]
    return {" ".join(["python", *line[1:]]) for line in lines if line and "python" in line[0]}


def check_make_runs(words: list[str]) -> None:
    """The command is, word for word, part of a make target that CI runs."""
    assert " ".join(words) in make_recipes(), f"{shlex.join(words)} is in no make target"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path):
    for words in commands(page):
        while "=" in words[0] and "/" not in words[0]:  # an environment variable
            words = words[1:]
        program = words[0].rpartition("/")[2]
        if program == "make":
            assert {w for w in words[1:] if "=" not in w and w[0] != "-"} <= make_targets(), words
        elif program in ("python", "python3"):
            check_python(words[1:])
        elif program == "pip":
            check_extras(words)
        elif program == "bash":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert program in HARMLESS, f"{page.name}: {shlex.join(words)}: teach this test"


def check_extras(words: list[str]) -> None:
    """`pip install 'jaxtune[extra]'` names an extra that exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in project["optional-dependencies"], words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


METHODS = schema.Peft.__dataclass_fields__["method"].metadata["choices"]
# Pages of methods that share one.
SHARED = {"p_tuning": "prompt"}
OTHERS = ("pissa", "loftq", "neftune", "longlora", "galore", "apollo")


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_every_method_has_a_page_with_all_its_parts(name: str):
    page = ROOT / "docs" / "peft" / f"{SHARED.get(name, name)}.md"
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^ {4}\S", text, re.MULTILINE), "no equation"
    for part in ("trains", "memory", "when"):
        assert re.search(rf"\*\*[^*]*{part}", text, re.IGNORECASE), f"does not say: {part}"
    assert "**Options**" in text or re.search(r"`(peft|train)\.\w+", text), "names no option"
    shown = " ".join(word for words in commands(page) for word in words)
    own = name in METHODS and name not in ("lora", *SHARED)
    assert f"--config.peft.method={name}" in shown if own else "jaxtune.train" in shown


def test_own_data_commands_of_the_readme_run(tmp_path: Path):
    steps = [c for c in commands(ROOT / "README.md") if c[:2] == ["python", "-m"]]
    assert [step[2] for step in steps] == ["jaxtune.train", "jaxtune.export", "jaxtune.generate"]
    steps[0] += ["--config.data.max_seq_len=64"]
    for code in blocks(ROOT / "README.md", "python"):
        steps.append(["python", "-c", code.replace('"my-model"', '"tiny:llama"')])
    row = blocks(ROOT / "README.md", "json")[0].splitlines()[0]
    (tmp_path / "my_data.jsonl").write_text(f"{row}\n" * 20)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["HOME"] = str(tmp_path)  # compiled programs are kept there
    for step in steps:
        words = [w.replace("=my-model", "=tiny:llama") for w in step[1:]]
        run = subprocess.run(
            [sys.executable, *(w.replace("=configs/", f"={ROOT}/configs/") for w in words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    written = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    named = {"adapter", "loss.png"}
    assert named | {"config.json", "metrics.jsonl", "checkpoints"} <= written
    assert (tmp_path / "runs" / "from_python" / "adapter").is_dir()
    assert (tmp_path / "my-tuned-model" / "model.safetensors").is_file()
