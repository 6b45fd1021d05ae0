"""Trains the demo's adapter on quantized bases twice: in jaxtune, and in PEFT on bitsandbytes.

    python tools/qlora_parity.py --base=HF_FOLDER --formats=none,nf4 --steps=60

Both start from the same adapter and see the same packed batches; `none` is the dense base. Prints
one JSON object: the losses of every step, by format and library, the largest difference of a step's
losses relative to the first loss, and the mean loss of the last ten steps relative to that of the
dense base. Needs the extra `test`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    get_linear_schedule_with_warmup,
)

from jaxtune import config, data

CONFIG = Path(__file__).resolve().parents[1] / "configs/lora_llama.py"
LAST = 10


def train_ours(folder: Path, base: str, *options: str) -> None:
    """Runs the training command of the demo, without evaluations."""
    command = [sys.executable, "-m", "jaxtune.train", f"--config={CONFIG}"]
    options += (f"model.path={base}", f"train.output_dir={folder}", "eval.exact_match=false")
    options += ("eval.max_new_tokens=128", "checkpoint.export_merged=false", "data.eval=")
    options += ("log.progress=off", "log.tensorboard=false", "log.plot=false")
    command += [f"--config.{option}" for option in options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def losses_of(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "grad_norm" in row]


def torch_base(base: str, format: str) -> Any:
    """The frozen model, dense or as bitsandbytes keeps it, computed in float32."""
    quantization = None
    if format == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif format != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=format,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=quantization,
        attn_implementation="eager",
        device_map="cpu",
    )


def train_theirs(folder: Path, format: str, base: str, adapter: Path, steps: int) -> list[float]:
    """Losses of PEFT on the batches of our run in `folder`, from the same adapter, with AdamW."""
    cfg = config.from_json((folder / "config.json").read_text())
    model = PeftModel.from_pretrained(torch_base(base, format), adapter, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, cfg.optim.learning_rate, betas=(0.9, 0.999), eps=cfg.optim.eps, weight_decay=0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, cfg.optim.warmup_steps, steps)
    tokenizer = data.load_tokenizer(base, template=None)
    rows, _ = data.load(
        cfg.data, tokenizer, seed=cfg.train.seed, vocab_size=model.config.vocab_size
    )
    loader = data.make_loader(
        rows, cfg.data, rows=1, accumulation=1, seed=cfg.train.seed, held=(0,)
    )
    stream, losses = loader.batches(), []
    for _ in range(steps):
        batch, _ = next(stream)
        loss = packed_loss(model, *(np.asarray(leaf)[0] for leaf in _fields(batch)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    stream.close()
    return losses


def _fields(batch: data.TokenBatch) -> tuple:
    return batch.tokens, batch.positions, batch.segment_ids, batch.weights


def packed_loss(
    model: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
    weights: np.ndarray,
) -> torch.Tensor:
    """Mean loss of the trained tokens of packed rows [B, T], each segment on its own."""
    causal = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    seen = causal & (segments[:, :, None] == segments[:, None, :])
    mask = torch.where(torch.from_numpy(seen)[:, None], 0.0, torch.finfo(torch.float32).min)
    ids, places = (torch.from_numpy(array).long() for array in (tokens, positions))
    logits = model(input_ids=ids, position_ids=places, attention_mask=mask).logits[:, :-1].float()
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    weight = torch.from_numpy(weights[:, 1:]).flatten()
    return (wanted * weight).sum() / weight.sum()


def main() -> None:
    """Reads the command line, trains and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="the dense model as transformers reads it")
    parser.add_argument("--formats", default="none,nf4")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        start, length = Path(scratch) / "start", f"train.num_steps={args.steps}"
        train_ours(start, args.base, "train.num_steps=1", "optim.learning_rate=0.0")
        for format in args.formats.split(","):
            folder = Path(scratch) / format
            quantized = () if format == "none" else (f"quant.format={format}",)
            train_ours(folder, args.base, length, *quantized)
            ours = losses_of(folder)
            theirs = train_theirs(folder, format, args.base, start / "adapter", args.steps)
            apart = float(np.abs(np.subtract(ours, theirs)).max() / theirs[0])
            report[format] = {"jaxtune": ours, "peft": theirs, "largest_difference": apart}
    for library in ("jaxtune", "peft"):
        means = {name: float(np.mean(found[library][-LAST:])) for name, found in report.items()}
        for name, mean in means.items():
            report[name][f"{library}_over_dense"] = mean / means.get("none", float("nan"))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
