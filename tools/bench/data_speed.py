"""What data cost on this machine: padding, tokenization, streams, and packed against padded steps.

    python tools/bench/data_speed.py packing --data=gsm8k_train.jsonl --tokenizer=<folder>
    python tools/bench/data_speed.py pipeline --data=gsm8k_train.jsonl --tokenizer=<folder>
    python tools/bench/data_speed.py stream --data=gsm8k_train.jsonl --seconds=600
    python tools/bench/data_speed.py step --data=gsm8k_train.jsonl --steps=6

Each prints one JSON object. packing: share of padding for each packer, rows of 1024 tokens.
pipeline: tokens a second of tokenizing, packing and batching from nothing, and seconds until the
first batch with a warm cache. stream: 20 GB (the file again and again, by name) read, tokenized,
packed and batched for so many seconds; resident memory over that of the imported interpreter.
step: real tokens a second of the training step of --model, with --rows examples a step padded to
1024, padded to the longest of them, and packed into as many rows as these examples fill.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import build, data, optim
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import packing
from jaxtune.schema import Data, Model, Peft, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_train_step

LENGTH, VOCABULARY = 1024, 1 << 20
STREAMED_BYTES = 20 << 30


def load(args: argparse.Namespace, cfg: Data) -> Any:
    """The data set of --data, tokenized, or its stream."""
    tokenizer = data.load_tokenizer(args.tokenizer)
    return data.load(cfg, tokenizer, seed=0, vocab_size=VOCABULARY)[0]


def packers(args: argparse.Namespace) -> dict[str, float]:
    """Share of padding for each packer."""
    found = load(args, Data(train=(args.data,), max_seq_len=LENGTH))
    order = np.random.default_rng([0, 0]).permutation(len(found.rows)).tolist()
    lengths = found.rows.lengths
    return {
        name: 1 - lengths.sum() / (len(pack(lengths, order, LENGTH)) * LENGTH)
        for name, pack in packing.PACKERS.items()
    }


def pipeline(args: argparse.Namespace) -> dict[str, float]:
    """Speed from files to batches, and of a warm start."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = Data(train=(args.data,), max_seq_len=LENGTH, cache=folder)
        data.load_tokenizer(args.tokenizer)("warm")  # imports are not the data's
        seconds, cpu = [], []
        tokens = 0
        for _ in range(2):
            began, began_cpu = time.monotonic(), time.process_time()
            found = load(args, cfg)
            loader = data.make_loader(found, cfg, rows=8)
            batches = islice(loader.batches(), loader.num_steps(1) if not tokens else 1)
            tokens += sum(int((batch.segment_ids > 0).sum()) for batch, _ in batches)
            seconds.append(time.monotonic() - began)
            cpu.append(time.process_time() - began_cpu)
            tokens = found.stats.tokens
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds[0],
        "tokens_per_cpu_second": tokens / cpu[0],
        "warm_start_seconds": seconds[1],
    }


def resident_mib() -> float:
    """Resident memory of this process that is no file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def stream(args: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of a stream."""
    copies = max(1, STREAMED_BYTES // os.path.getsize(args.data))
    cfg = Data(train=(args.data,) * copies, max_seq_len=LENGTH, streaming=True)
    tokenizer = data.load_tokenizer(args.tokenizer)
    tokenizer("warm")
    before, began = resident_mib(), time.monotonic()
    found: Any = data.load(cfg, tokenizer, seed=0, vocab_size=VOCABULARY)[0]
    iterator = data.make_loader(found, cfg, rows=args.rows).batches()
    tokens, peaks, last = 0, [], began
    for batch, _ in iterator:
        tokens += int((batch.segment_ids > 0).sum())
        now = time.monotonic()
        if now - last > args.seconds / 10:
            peaks.append(round(resident_mib() - before))
            last = now
        if now - began > args.seconds:
            break
    iterator.close()
    return {
        "source_gib": round(found.num_bytes / 2**30, 1),
        "tokens_per_second": tokens / (time.monotonic() - began),
        "mib_over_the_interpreter": peaks,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Real tokens a second of the training step, for three ways to fill rows."""
    ways = {
        "packed": Data(train=(args.data,), max_seq_len=LENGTH),
        "longest": Data(train=(args.data,), max_seq_len=LENGTH, packing=False, pad_to="longest"),
        "max": Data(train=(args.data,), max_seq_len=LENGTH, packing=False),
    }
    filled = load(args, ways["packed"]).mean_length / LENGTH
    rows = {name: args.rows for name in ways} | {"packed": max(1, round(args.rows * filled))}
    speeds = {name: _speed(args, cfg, rows[name]) for name, cfg in ways.items()}
    ratios = {f"packed_over_{name}": speeds["packed"] / speeds[name] for name in ("max", "longest")}
    return {"rows_a_step": rows, "tokens_per_second": speeds} | ratios


def _speed(args: argparse.Namespace, cfg: Data, rows: int) -> float:
    """Tokens without padding a second, each shape compiled before it is timed."""
    config = RunConfig(model=Model(path=args.model), peft=Peft(rank=8), data=cfg)
    run = build.describe(config, make_mesh({"data": 1, "fsdp": 1}), open_checkpoint(args.model))
    schedule = optim.make_schedule(config.optim, 100)
    tx = optim.make_optimizer(config.optim, schedule, build.trained_axes(run))
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    state = build.initial_state(run, tx, {name: values[name] for name in run.trainable})
    frozen = {name: values[name] for name in run.frozen}
    step = make_train_step(run.skeleton, run.objective, tx, schedule, 0)
    loader = data.make_loader(load(args, cfg), cfg, rows=rows)
    batches = [batch for batch, _ in islice(_closing(loader.batches()), args.steps)]
    for batch in {batch.tokens.shape: batch for batch in batches}.values():
        state, metrics = step(state, frozen, run.put(batch))
    jax.block_until_ready(metrics)
    began = time.monotonic()
    for batch in batches:
        state, metrics = step(state, frozen, run.put(batch))
    jax.block_until_ready(metrics)
    return sum((b.segment_ids > 0).sum() for b in batches) / (time.monotonic() - began)


def _closing(items: Any) -> Iterator[Any]:
    try:
        yield from items
    finally:
        items.close()


def main() -> None:
    """Reads the command line and prints the measurement."""
    what = {"packing": packers, "pipeline": pipeline, "stream": stream, "step": steps}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=what)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", default="tiny:llama")
    parser.add_argument("--model", default="tiny:llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(json.dumps({"what": args.what, "rows": args.rows} | what[args.what](args), default=float))


if __name__ == "__main__":
    main()
