"""What fits where, and how fast it might be: `python -m jaxtune.plan` for well-known steps.

    python tools/bench/plan_table.py --out=runs/plan_table.json                 well-known steps
    python tools/bench/plan_table.py --out=runs/plan_table.json 8b-lora-v5e-16  one
    python tools/bench/plan_table.py --out=runs/plan_families.json --families   LoRA of each family
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
_FULL = "--config.model.remat=full"
_LABELS = (
    _FULL,
    "--config.data.max_seq_len=512",
    "--config.objective.name=sequence_classification",
    "--config.objective.labels=yes,no",
)
_NEW_POOLER = ("--config.peft.modules_to_save=pooler", "--config.peft.exclude_modules=pooler")
_PAIRS = (_FULL, "--config.objective.name=seq2seq", "--config.data.packing=false")
_EXPERTS = (_FULL, "--config.mesh.expert=4")
_V5E = "v5e:4x4"
# By model_type, the published size nearest to 7B; of encoders the largest, of mixtures the
# smallest. Rows are 2048 tokens, or what the model or the chips have room for.
FAMILIES = {
    "baichuan": (_V5E, "baichuan:2-7b", _FULL),
    "bert": (_V5E, "bert:335m", *_LABELS, *_NEW_POOLER),
    "bloom": (_V5E, "bloom:7b1", _FULL),
    "chatglm": (_V5E, "chatglm:6b", _FULL),
    "deepseek_v2": (_V5E, "deepseek_v2:16b-lite", *_EXPERTS),
    "deepseek_v3": (
        "v5e:16x16",
        "deepseek_v3:671b",
        _FULL,
        "--config.mesh.expert=16",
        "--config.quant.format=nf4",
        "--config.data.max_seq_len=512",
    ),
    "electra": (_V5E, "electra:335m", *_LABELS),
    "falcon": (_V5E, "falcon:7b", _FULL),
    "gemma": (_V5E, "gemma:7b", _FULL),
    "gemma2": (_V5E, "gemma2:9b", _FULL),
    "gemma3_text": (_V5E, "gemma3_text:1b", _FULL),
    "glm": (_V5E, "glm:9b", _FULL),
    "glm4": (_V5E, "glm4:9b", _FULL),
    "gpt2": (_V5E, "gpt2:1.5b", _FULL, "--config.data.max_seq_len=1024"),
    "gpt_neox": (_V5E, "gpt_neox:6.9b", _FULL),
    "gpt_oss": (_V5E, "gpt_oss:20b", *_EXPERTS, "--config.data.max_seq_len=1024"),
    "gptj": (_V5E, "gptj:6b", _FULL),
    "internlm": (_V5E, "internlm:7b", _FULL),
    "internlm2": (_V5E, "internlm2:7b", _FULL),
    "internlm3": (_V5E, "internlm3:8b", _FULL),
    "llama": (_V5E, "llama:8b", _FULL),
    "mistral": (_V5E, "mistral:7b", _FULL),
    "mixtral": (_V5E, "mixtral:8x7b", *_EXPERTS),
    "mt5": (_V5E, "mt5:xl", *_PAIRS),
    "olmo2": (_V5E, "olmo2:7b", _FULL),
    "opt": (_V5E, "opt:6.7b", _FULL),
    "phi3": (_V5E, "phi3:3.8b", _FULL),
    "qwen": (_V5E, "qwen:7b", _FULL),
    "qwen2": (_V5E, "qwen2:7b", _FULL),
    "qwen2_moe": (_V5E, "qwen2_moe:14b-a2.7b", *_EXPERTS),
    "qwen3": (_V5E, "qwen3:8b", _FULL),
    "qwen3_moe": (_V5E, "qwen3_moe:30b-a3b", *_EXPERTS),
    "roberta": (_V5E, "roberta:355m", *_LABELS),
    "stablelm": (_V5E, "stablelm:3b", _FULL),
    "t5": (_V5E, "t5:3b", *_PAIRS),
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
    topology, model, *options = (ROWS | FAMILIES)[name]
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
    topology, model, *options = (ROWS | FAMILIES)[name]
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
    parser.add_argument(
        "rows", nargs="*", help=f"of {', '.join(ROWS | FAMILIES)}; default: the well-known steps"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plan_table.json"))
    parser.add_argument("--families", action="store_true", help="the rows of all families")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for name in [] if args.table else args.rows or (FAMILIES if args.families else ROWS):
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
