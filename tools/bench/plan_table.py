"""What fits where, and how fast it might be: `python -m jaxtune.plan` for well-known steps.

    python tools/bench/plan_table.py --out=runs/plan_table.json                 every row
    python tools/bench/plan_table.py --out=runs/plan_table.json 8b-lora-v5e-16  one
    python tools/bench/plan_table.py --out=runs/plan_table.json --table         only prints

A row that is in --out already is not computed again; a step that does not fit is a row too. Rows
for TPUs need libtpu, rows for GPUs the CUDA plugin, and minutes of CPU each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "8b-lora-v5e-16": ("v5e:4x4", "llama:8b", "--config.model.remat=full"),
    "8b-qlora-v5e-1": ("v5e:1x1", "llama:8b", "--config.quant.format=nf4"),
    "70b-lora-v5e-64": ("v5e:8x8", "llama:70b", "--config.model.remat=full"),
    "70b-qlora-v6e-8": ("v6e:2x4", "llama:70b", "--config.quant.format=nf4"),
    "104b-qlora-v6e-8": ("v6e:2x4", "llama:104b", "--config.quant.format=nf4"),
    "104b-qlora-v5p-4": ("v5p:2x2x1", "llama:104b", "--config.quant.format=nf4"),
    "405b-lora-v5p-256": ("v5p:4x8x8", "llama:405b", "--config.model.remat=full"),
    "8b-lora-rtx4090-1": ("rtx4090:1", "llama:8b", "--config.model.remat=full"),
    "8b-qlora-rtx4090-1": ("rtx4090:1", "llama:8b", "--config.quant.format=nf4"),
    "70b-qlora-h100-8": ("h100:8", "llama:70b", "--config.quant.format=nf4"),
}
SHARED = (
    f"--config={ROOT / 'configs' / 'lora.py'}",
    "--config.data.train=none",
    "--config.data.max_seq_len=2048",
    "--config.train.micro_batch_size=1",
    "--config.peft.rank=16",
)


def measure(name: str) -> dict[str, Any]:
    """Plans one row in a process of its own."""
    topology, model, *options = ROWS[name]
    command = [sys.executable, "-m", "jaxtune.plan", f"--topology={topology}", "--json", *SHARED]
    command += [f"--config.model.path={model}", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    result = {"exit_code": done.returncode, "wall_seconds": round(time.monotonic() - start)}
    if done.stdout.strip():
        return result | json.loads(done.stdout.splitlines()[-1])
    return result | {"error": done.stderr.strip().splitlines()[-1]}


def line(name: str, row: dict[str, Any]) -> str:
    """One row of a Markdown table."""
    topology, model, *options = ROWS[name]
    cells = [f"{model} {' '.join(options).replace('--config.', '')}", topology]
    if "error" in row:
        return "| " + " | ".join([*cells, row["error"]]) + " |"
    fits = "fits" if row["exit_code"] == 0 else "does not fit"
    cells += [f"{row['total'] / 2**30:.2f} of {row['limit'] / 2**30:.0f} GiB, {fits}", row["remat"]]
    estimate = row["estimate"]
    cells += [f"{estimate['step_seconds'] * 1e3:,.0f} ms", f"{estimate['tokens_per_second']:,.0f}"]
    cells += [estimate["limited_by"], f"{row['compile_seconds']:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Computes the rows that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/plan_table.json"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for name in [] if args.table else args.rows or ROWS:
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        if name not in known:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(known | {name: measure(name)}, indent=1) + "\n")
    print("| step | devices | a device needs | remat | estimate | tokens/s | limit | compiled in |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in json.loads(args.out.read_text()).items():
        print(line(name, row))


if __name__ == "__main__":
    main()
