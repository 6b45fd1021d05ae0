"""Compiles a kernel for a TPU that is not there and says what its hot loop is bound by.

    python tools/tpu_kernel_report.py --list
    python tools/tpu_kernel_report.py splash-forward:T=8192,block_q=1024 matmul-bf16 --chip=v5e
    python tools/tpu_kernel_report.py matmul:format=nf4,dx=1 --chip=v5e --chip=v6e --json

Needs `jax[tpu]`'s libtpu, no TPU. A case (tools/tpu_kernel_cases.py) is compiled in a process of
its own, in which libtpu writes down the VLIW program of every kernel; tools/tpu_llo.py reads it and
explains the terms:

    base, body, idle   parts of a grid step; one line for each alternative body, its percentages
                       (slots used of those there are) and counts are those of base + body
    static ms          (trips of the grid x base + executed bodies x body) / clock
    MXU-bound ms       flops / peak: the least time on this chip
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpu_llo import (  # pyright: ignore[reportMissingImports]
    CHIPS,
    SLOTS,
    Chip,
    dump_environment,
    dumped,
    kernel_flops,
    read_program,
    steps,
)


def lines_of(name: str, program: dict[str, Any], compiled: dict, chip: Chip) -> Iterator[dict]:
    """One record for each alternative of a kernel's grid step."""
    base = program["base"]
    flops = next((n for part, n in compiled["flops"].items() if part in name), 0)
    trips, executed = steps(program, flops if compiled["dense"] else 0, chip)
    executed = next((n for part, n in compiled["executed"].items() if part in name), executed)
    for body in program["bodies"]:
        total = base + body
        used = zip(SLOTS, total.slots, program["capacity"], strict=True)
        record = {"kernel": name, "vmem_bytes": program["vmem"], "trips": trips}
        record |= {"base": base.bundles, "body": body.bundles, "idle": program["idle"]}
        record["percent"] = {
            slot: round(100 * n / (total.bundles * most), 1) for slot, n, most in used
        }
        record["fills"] = total.slots[SLOTS.index("FILL")]
        record["spills"] = total.slots[SLOTS.index("SPILL")]
        seconds = (trips * base.bundles + executed * body.bundles) / chip.clock
        record |= {"executed": executed, "static_ms": round(seconds * 1e3, 3)}
        if flops:
            peak = chip.flops * compiled["cores"] / chip.cores
            record["mxu_bound_ms"] = round(flops / peak * 1e3, 3)
        yield record


def report(name: str, chip_name: str, keep: str | None = None) -> dict[str, Any]:
    """Compiles one case in a process of its own and reads what libtpu wrote down.

    Args:
        name: a case and its options, `splash-forward:T=8192,block_q=1024`.
        chip_name: of CHIPS.
        keep: folder in which the dumps are left.

    Returns:
        {"case", "chip", "temp_bytes", "kernels": [one record per alternative of a hot loop]}, or
        {"case", "chip", "error"} with the compiler's message.
    """
    head, chip = {"case": name, "chip": chip_name}, CHIPS[chip_name]
    with tempfile.TemporaryDirectory(prefix="llo-") as temporary:
        folder = Path(keep or temporary)
        env = os.environ | dump_environment(folder)
        command = [sys.executable, __file__, "--compile", name, "--chip", chip_name]
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        if child.returncode:
            return head | {"error": " ".join(child.stderr.split()[-60:])}
        compiled = json.loads(child.stdout.splitlines()[-1])
        if "error" in compiled:
            return head | compiled
        kernels = [
            record
            for kernel, files in dumped(folder)
            if kernel in compiled["calls"]
            for record in lines_of(kernel, read_program(files, chip), compiled, chip)
        ]
    return head | {"temp_bytes": compiled["temp_bytes"], "kernels": kernels}


def compile_case(name: str, chip_name: str) -> dict[str, Any]:
    """Compiles a case in this process: its kernels' names, work, and temporary HBM."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from tpu_kernel_cases import CASES  # pyright: ignore[reportMissingImports]

    topology = CHIPS[chip_name].topology
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    kind, _, options = name.partition(":")
    given = dict(option.split("=") for option in options.split(",") if option)
    case: Any = CASES[kind](array, **{k: int(v) if v.isdigit() else v for k, v in given.items()})
    try:
        compiled = jax.jit(case.function).lower(*case.args).compile()
    except Exception as error:  # the message is what was asked for
        size = re.search(r"Scoped allocation with .*?limit\.?", str(error))
        return {"error": size[0] if size else f"{type(error).__name__}: {error}"[:1000]}
    text = compiled.as_text() or ""
    instructions = re.findall(r"^ *(?:ROOT )?%(\S+) = .*? (custom-call|fusion)\(", text, re.M)
    custom = [call for call, kind in instructions if kind == "custom-call"]
    memory: Any = compiled.memory_analysis()
    return {
        "calls": custom if case.pallas else [call for call, _ in instructions],
        "executed": dict(case.executed),
        "dense": case.dense,
        "cores": device.num_cores,
        "flops": dict(case.flops) or kernel_flops(text),
        "temp_bytes": memory.temp_size_in_bytes,
    }


COLUMNS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "LOAD", "STORE", "SALU")
WORK = ("executed", "static_ms", "mxu_bound_ms")


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports as text, one line for each alternative of a kernel's hot loop."""
    lines = []
    for r in reports:
        result = r.get("error", f"{r.get('temp_bytes')} bytes of temporaries")
        lines.append(f"{r['case']} on {r['chip']}: {result}")
        for k in r.get("kernels", ()):
            lines.append(f"  {k['kernel']}" + f" idle {k['idle']}" * bool(k["idle"]))
            cells = {key: k[key] for key in ("trips", "base", "body", "fills", "spills")}
            cells |= {"VMEM KiB": k["vmem_bytes"] >> 10}
            cells |= {f"{slot} %": k["percent"][slot] for slot in COLUMNS}
            cells |= {key.replace("_ms", " ms"): k[key] for key in WORK if key in k}
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in cells.items()))
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, compiles the cases one after the other, prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="name or name:option=value,...")
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: v5e")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="cases, with their options")
    parser.add_argument("--keep", help="leave the dumps in this folder")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chips = args.chip or ["v5e"]
    if args.compile:
        print(json.dumps(compile_case(args.compile, chips[0])))
        return
    if args.list:
        from tpu_kernel_cases import CASES  # pyright: ignore[reportMissingImports]

        for name, make in CASES.items():
            options = list(inspect.signature(make).parameters.values())[1:]
            print(name + ":" + ",".join(f"{o.name}={o.default}" for o in options))
        return
    reports = [report(case, chip, args.keep) for chip in chips for case in args.cases]
    print(json.dumps(reports, indent=1) if args.json else table(reports))
    if any("error" in r for r in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
