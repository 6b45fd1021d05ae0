"""Memory and estimated time of the LoRA and QLoRA step of Llama-3.1-8B on TPUs that are not there.

    python tools/bench/qlora_memory.py --out=runs/qlora_memory.json
    python tools/bench/qlora_memory.py --out=... --base=nf4 --remat=full,dots --where=one
    python tools/bench/qlora_memory.py --out=... --base=nf4 --remat=full --longest
    python tools/bench/qlora_memory.py --out=... --table

The very step that `jaxtune.train` would run (build.describe, step.make_train_step) is compiled from
shapes, in a process of its own, for `share`, one chip's part of v5e:4x4 with FSDP over its 16 chips
and a row of 2048 tokens each, or `one`, a single v5e chip of 16 GB. What is read: the compiler's
account of memory (exact for this libtpu), what the all-gathers carry, and the estimate of time of
`jaxtune.hlo`, in which kernels and products cost their static bundle counts. A row that is in --out
already is not computed again; out of memory is a row too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tpu_llo  # noqa: E402  # pyright: ignore[reportMissingImports]

BASES = ("bf16", "int8", "int8_block", "int4", "nf4", "fp4")
REMAT = ("none", "attention", "dots", "offload", "full")
WHERE = {"share": ("v5e:4x4", 16), "one": ("v5e:2x2", 1)}
CHIP = "v5e"


def compile_row(row: dict[str, Any], dumps: Path) -> dict[str, Any]:
    """Compiles one row's step in this process and reads it."""
    import jax
    from jax.experimental import topologies

    from jaxtune import build, config, fit, optim
    from jaxtune.checkpoint.source import open_description
    from jaxtune.sharding import mesh
    from jaxtune.step import make_train_step

    tree = config.default()
    tree.data.train = ("none: only shapes are used",)
    tree.data.max_seq_len = row["length"]
    tree.train.micro_batch_size = 1
    tree.peft.rank = 16
    tree.model.remat = row["remat"]
    tree.model.attention, tree.model.matmul = row["attention"], row["matmul"]
    if row["base"] != "bf16":
        tree.quant.format = (row["base"],)
    topology, count = WHERE[row["where"]]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    grid = mesh.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices[:count])
    checkpoint = open_description("llama:8b")
    run = build.describe(config.resolve(tree), grid, checkpoint)
    schedule = optim.make_schedule(run.config.optim, 1000)
    tx = build.make_optimizer(run, schedule)
    state = build.abstract_state(run, tx)
    shardings = build.shardings(state)
    step = make_train_step(run.skeleton, run.objective, tx, schedule, 0, shardings)
    result: dict[str, Any] = {"weight_bytes_per_parameter": _weight_bytes(run.frozen)}
    batch = fit.abstract_batch(run)
    start = time.process_time()
    try:
        compiled = step.lower(state, run.frozen, batch).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"oom": _needed(str(error))}
    result["compile_cpu_s"] = round(time.process_time() - start)
    return result | _read(compiled, dumps, dict(run.mesh.shape))


def _weight_bytes(frozen: dict[str, Any]) -> float:
    """Bytes per parameter of the layers' matrices: codes, scales, nested scales and offsets."""
    import jax

    kernels = [leaf for name, leaf in frozen.items() if re.fullmatch(r"layers\..*\.kernel", name)]
    stored = sum(a.size * a.dtype.itemsize for k in kernels for a in jax.tree.leaves(k))
    count = 0
    for kernel in kernels:
        size = 1
        for n in kernel.shape:
            size *= n
        count += size
    return round(stored / count, 4)


def _needed(error: str) -> str:
    """The sizes in a message about memory."""
    pattern = r"([\d.]+[KMGT])\w*\)? (?:of|exceeds available HBM) \(?([\d.]+[KMGT])"
    sizes = re.search(pattern, error)
    return f"{sizes[1]} of {sizes[2]}" if sizes else error[:300]


def _read(compiled: Any, dumps: Path, mesh: dict[str, int]) -> dict[str, Any]:
    from jaxtune import hardware
    from jaxtune.hlo.timeline import Reading

    plan = compiled.memory_analysis()
    sizes = {
        "args": plan.argument_size_in_bytes,
        "temp": plan.temp_size_in_bytes,
        "code": plan.generated_code_size_in_bytes,
        "new": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        "host": plan.host_temp_size_in_bytes + plan.host_argument_size_in_bytes,
        "peak": getattr(plan, "peak_memory_in_bytes", 0),
    }
    result = {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()}
    total = sizes["args"] + sizes["new"] + sizes["temp"] + sizes["code"]
    result["total_gib"] = round(total / 2**30, 3)
    text = compiled.as_text()
    (dumps / "step.hlo").write_text(text)
    chip = hardware.CHIPS["TPU v5 lite"]
    flops = tpu_llo.kernel_flops(text) | Reading(text, mesh, chip).products()
    reading = Reading(text, mesh, chip, tpu_llo.kernel_seconds(dumps, CHIP, flops))
    work = reading.work()
    return result | {
        "tflop": round(work.flops / 1e12, 2),
        "est_ms": round(work.seconds * 1e3, 1),
        "kernel_ms": round(work.kernel_seconds * 1e3, 1),
        "exposed_ms": round(work.waiting_seconds * 1e3, 1),
        "bound_ms": round(work.flops / chip.flops * 1e3, 1),
        "received_gib": {f"{k} {d}": round(v / 2**30, 3) for (k, _, d), v in work.received.items()},
        "unread_loops": sorted(reading.unread_loops),
    }


def key_of(row: dict[str, Any]) -> str:
    """The name of a row in the file of results."""
    return " ".join(f"{name}={value}" for name, value in row.items())


def measure(row: dict[str, Any], out: Path, keep: str | None) -> dict[str, Any]:
    """The row's result: from the file, or compiled now and added to it."""
    results = json.loads(out.read_text()) if out.exists() else {}
    key = key_of(row)
    if key in results:
        return results[key]
    with tempfile.TemporaryDirectory(prefix="step-") as temporary:
        dumps = Path(keep or temporary)
        env = os.environ | tpu_llo.dump_environment(dumps)
        command = [sys.executable, __file__, "--compile", json.dumps(row), "--keep", str(dumps)]
        child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        return {"error": child.stderr.strip()[-1500:]}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = row | {"commit": commit} | json.loads(child.stdout.splitlines()[-1])
    results = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results | {key: result}, indent=1) + "\n")
    return result


def longest(row: dict[str, Any], out: Path, step: int = 1024) -> int:
    """The longest row of tokens, in multiples of `step`, whose step fits; 0 if none does."""

    def fits(length: int) -> bool:
        result = measure(row | {"length": length}, out, None)
        print(describe(result), flush=True)
        return "total_gib" in result

    low, high = 0, 2048
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe(result: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in result:
        return f"error: {result['error']}"
    head = [result[name] for name in ("where", "base", "remat", "length", "attention", "matmul")]
    line = "{:5} {:10} {:9} {:6} {}/{}:".format(*head)
    line += f" {result['weight_bytes_per_parameter']:.4f} B/param,"
    if "oom" in result:
        return f"{line} out of memory ({result['oom']})"
    sizes = ("args", "temp", "peak", "total", "host")
    line += ", ".join(f" {name} {result[f'{name}_gib']:.2f}" for name in sizes) + " GiB,"
    line += f" {result['tflop']} TFLOP, est {result['est_ms']} ms, kernels {result['kernel_ms']} ms"
    gathers = {k: v for k, v in result["received_gib"].items() if v >= 0.05}
    return f"{line}, received GiB {gathers}" if gathers else line


def main() -> None:
    """Reads the command line, computes the missing rows one after the other, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/qlora_memory.json"))
    parser.add_argument("--base", default=",".join(BASES))
    parser.add_argument("--remat", default=",".join(REMAT))
    parser.add_argument("--where", default=",".join(WHERE))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--attention", default="pallas_tpu")
    parser.add_argument("--matmul", default="pallas_tpu")
    parser.add_argument("--longest", action="store_true", help="search it, on `one`")
    parser.add_argument("--table", action="store_true", help="print the file, compute nothing")
    parser.add_argument("--keep", help="leave the dumps and step.hlo in this folder")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compile_row(json.loads(args.compile), Path(args.keep))))
        return
    if args.table:
        print("\n".join(map(describe, json.loads(args.out.read_text()).values())))
        return
    for where in ["one"] if args.longest else args.where.split(","):
        for base in args.base.split(","):
            for remat in args.remat.split(","):
                row = {"where": where, "base": base, "remat": remat, "length": args.length}
                row |= {"attention": args.attention, "matmul": args.matmul}
                if args.longest:
                    print(f"longest: {longest(row, args.out)} tokens", flush=True)
                else:
                    print(describe(measure(row, args.out, args.keep)), flush=True)


if __name__ == "__main__":
    main()
