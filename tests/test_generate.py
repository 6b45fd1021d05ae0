"""The generation command on a tiny model."""

import io
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import jaxtune
from jaxtune import generate
from jaxtune.errors import ConfigError, DataError, StorageError

FEW = ["--max_new_tokens=6"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--model=tiny:llama", *arguments])
    monkeypatch.setattr(generate.hardware, "prepare", lambda _: None)
    generate.main()


def test_a_prompt_is_answered_on_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(monkeypatch, "--prompt=Hello", *FEW)
    expected = jaxtune.load("tiny:llama").generate(
        [{"role": "user", "content": "Hello"}], max_new_tokens=6
    )
    assert capsys.readouterr().out == expected[0] + "\n"


def test_a_file_of_rows_becomes_a_file_of_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user, assistant = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Ho")))
    rows = [{"prompt": "Hi"}, {"messages": [user, assistant]}]
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, f"--file={source}", f"--out={out}", "--system=Be brief.", *FEW)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[0]["prompt"] == "Hi" and written[1]["reference"] == "Ho"
    assert written[0]["answer"] == written[1]["answer"]  # the same conversation
    assert [path.name for path in tmp_path.iterdir() if "answers" in path.name] == [out.name]


def test_lines_of_text_are_continued_raw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    run(monkeypatch, f"--file={tmp_path / 'prompts.txt'}", "--raw", *FEW)
    answers = jaxtune.load("tiny:llama").generate(["one", "two"], max_new_tokens=6)
    assert capsys.readouterr().out == f"> one\n{answers[0]}\n\n> two\n{answers[1]}\n\n"


def test_a_chat_remembers_forgets_and_survives_a_long_turn() -> None:
    session = jaxtune.load("tiny:llama")
    options = {"max_new_tokens": 6}
    lines = iter(["Hello", "", "x" * 600, "And now?", "/reset", "Hello", "/exit", "not read"])
    out = io.StringIO()
    generate.chat(session, "Be brief.", options, read=lambda _: next(lines), out=out)
    system, hello = (
        {"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hello"))
    )
    first = session.generate([system, hello], **options)[0]
    then = [system, hello, {"role": "assistant", "content": first}]
    second = session.generate([*then, {"role": "user", "content": "And now?"}], **options)[0]
    text = out.getvalue()
    assert text.startswith(generate.HELP) and "positions" in text
    assert text.endswith(f"{second}\n{first}\n") and text.count(first) >= 2
    assert next(lines) == "not read"


class Named:
    """A session that says which adapters it was asked with."""

    asked: ClassVar[list[str]] = []

    def __init__(self, name: str = "base"):
        self.name = name

    def using(self, adapter: dict[str, float]) -> "Named":
        if "absent" in adapter:
            raise ConfigError("adapter 'absent' is not loaded")
        return Named(str(adapter))

    def generate(self, prompts: list[str], **options: object) -> list[str]:
        self.asked.append(self.name)
        return [f"{self.name} {prompt}" for prompt in prompts]


def test_rows_choose_their_adapters(tmp_path: Path) -> None:
    names, out = ("a", None, "b:0.5,a", "a"), tmp_path / "answers.jsonl"
    rows = [{"prompt": str(i)} | ({"adapter": a} if a else {}) for i, a in enumerate(names)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model=m", "--raw", f"--file={tmp_path / 'p.jsonl'}", f"--out={out}"]
    parsed = generate.parse_arguments([*arguments, "--adapter=a=x", "--adapter=b=y=z", "--use=b"])
    assert parsed.adapter == {"a": "x", "b": "y=z"}
    generate.answer_file(Named(), parsed, {})  # type: ignore[arg-type]
    answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    a = "{'a': 1.0}"
    assert answers == [f"{a} 0", "{'b': 1.0} 1", "{'b': 0.5, 'a': 1.0} 2", f"{a} 3"]


def test_adapters_of_all_rows_are_checked_before_any_is_answered(tmp_path: Path) -> None:
    Named.asked.clear()
    rows = [{"prompt": "0", "adapter": "a"}, {"prompt": "1", "adapter": "absent"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = generate.parse_arguments(["--model=m", "--raw", f"--file={tmp_path / 'p.jsonl'}"])
    with pytest.raises(ConfigError, match="not loaded"):
        generate.answer_file(Named(), parsed, {})  # type: ignore[arg-type]
    assert Named.asked == []
    with pytest.raises(ConfigError, match="a:0.7,a:0.3: a name stands there twice"):
        generate.chosen("a:0.7,a:0.3")


def test_a_chat_takes_other_adapters() -> None:
    lines = iter(["/use a:2", "/use a:x", "/exit"])
    out = io.StringIO()
    generate.chat(Named(), None, {}, read=lambda _: next(lines), out=out)  # type: ignore[arg-type]
    assert "a:x: a weight is no number" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--adapter=x", "--adapter=y"], "need names"),
        (["--prompt=a", "--adapter=x", "--use=y"], "need names"),
        (["--prompt=a", "--adapter=a=x", "--adapter=a=y"], "the same name"),
        ([], "--prompt"),
        (["--prompt=a", "--chat"], "--chat"),
        (["--prompt=a", "--raw", "--system=b"], "--raw"),
        (["--prompt=a", "--out=b"], "--out"),
        (["--prompt=a", "--temprature=1"], "--temprature"),
        (["--prompt=a", "--top_p=7"], "top_p"),
    ],
)
def test_wrong_command_lines_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(monkeypatch, *arguments)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"question": "a"}\n',
        '{"messages": [{"role": "user"}]}\n',
        '{"prompt": "a", "adapter": ["b"]}\n',
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError):
        generate.read_prompts(path)


def test_an_unwritable_output_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(StorageError, match="cannot write"):
        run(monkeypatch, f"--file={tmp_path / 'p.txt'}", f"--out={tmp_path / 'no' / 'a.jsonl'}")
