"""Checks what `make demo` left behind: it learnt what it promises, without torch on the machine.

.venv/bin/python tools/check_demo.py [folder, default runs/lora_llama]
"""

import importlib.util
import json
import sys
from pathlib import Path

MOST_BEFORE, LEAST_AFTER = 0.05, 0.9
ORACLES = ("torch", "peft", "trl")
WRITTEN = ("config.json", "loss.png", "samples.jsonl", "adapter", "merged", "checkpoints")


def problems(folder: Path) -> list[str]:
    """What the demo's folder lacks; empty if it keeps its promise."""
    found = [f"{name} is installed" for name in ORACLES if importlib.util.find_spec(name)]
    found += [f"{folder / name} is missing" for name in WRITTEN if not (folder / name).exists()]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]
    scores = [row["exact_match"] for row in rows if "exact_match" in row]
    print(f"held-out exact match: {scores}")
    if not scores or scores[0] > MOST_BEFORE or scores[-1] < LEAST_AFTER:
        found.append(f"expected at most {MOST_BEFORE} before and at least {LEAST_AFTER} after")
    return found


def main() -> None:
    """Prints what is wrong and exits with 1 if anything is."""
    found = problems(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lora_llama"))
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
