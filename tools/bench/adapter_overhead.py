"""What an adapter adds to a step: products, traffic of the memory and estimated time, per method.

    python tools/bench/adapter_overhead.py --out=runs/overhead.json [--methods=lora,dora]

`python -m jaxtune.plan` compiles the step of Llama-3.1-8B for v5e:4x4 (FSDP over 16 chips, a row of
2048 tokens each, full recomputation), without a TPU. All is divided by a step that trains a prompt
of one token: it has the whole forward and backward pass of the frozen model, and no adapter in any
layer. A method that is in --out already is not compiled again. Minutes of CPU for each method.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = "frozen"
OPTIONS = {
    BASE: ("peft.method=prompt", "peft.num_virtual_tokens=1"),
    "lora": ("peft.method=lora", "peft.rank=16"),
    "dora": ("peft.method=dora", "peft.rank=16"),
    "oft": ("peft.method=oft",),
    "ia3": ("peft.method=ia3", "peft.target_modules=k_proj,v_proj,down_proj"),
    "vera": ("peft.method=vera", "peft.rank=256"),
}
SHARED = (
    f"--config={ROOT / 'configs' / 'lora.py'}",
    "--topology=v5e:4x4",
    "--json",
    "--config.model.path=llama:8b",
    "--config.model.remat=full",
    "--config.data.train=none",
    "--config.data.max_seq_len=2048",
    "--config.train.micro_batch_size=1",
)
MEASURES = {
    "products": lambda plan: plan["flops"],
    "traffic": lambda plan: plan["memory_traffic"],
    "step": lambda plan: plan["estimate"]["step_seconds"],
    "memory": lambda plan: plan["total"],
}


def compiled(method: str) -> dict[str, Any]:
    """The plan of a method's step, compiled in a process of its own."""
    command = [sys.executable, "-m", "jaxtune.plan", *SHARED]
    command += [f"--config.{option}" for option in OPTIONS[method]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compiles what is missing and prints a table of ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--methods", default=",".join(OPTIONS), help="separated by commas")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    names = [BASE, *(name for name in arguments.methods.split(",") if name != BASE)]
    print("| method | " + " | ".join(MEASURES) + " |")
    print("|---" * (len(MEASURES) + 1) + "|")
    for name in names:
        if name not in found:
            found[name] = compiled(name)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        ratios = [measure(found[name]) / measure(found[BASE]) for measure in MEASURES.values()]
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
