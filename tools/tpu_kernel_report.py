"""Compiles a kernel for a TPU that is not there and says what its hot loop is bound by.

    python tools/tpu_kernel_report.py --list
    python tools/tpu_kernel_report.py splash-forward:T=8192,block=1024 matmul-bf16 --chip=v5e
    python tools/tpu_kernel_report.py nf4-forward --chip=v6e --json

Needs `jax[tpu]`'s libtpu, no TPU. A case (tools/tpu_kernel_cases.py) is compiled in a process of
its own, in which libtpu writes down the VLIW program of every kernel, in files of which three are
read:

    packed-bundles-post-ra        the program after register allocation: loops, branches, addresses
    pre-delay_..-utilization      slots that each bundle occupies (MXU, XLU, VALU ...), capacities
    pre-finalize-..-allocations   VMEM: windows (both buffers), scratch and the compiler's own

A bundle is one cycle if nothing stalls. Bundles are counted before the pass that folds empty ones
into delay fields, so that waiting for the matrix unit counts; the later `final_bundles` dump is
shorter and would flatter a kernel. Not in any number here: stalls on HBM, and the time of DMA that
the pipeline hides.

How a grid step is counted. The grid is one loop of the program (`LB` to its backward branch). What
`pl.when` and `lax.cond` guard is a region of it, which a forward branch skips. Of the loop that
issues most matrix work (a loop inside another is a loop of its own, to be multiplied by its trips):

    base    bundles of every step: those outside such regions, and of regions around other ones
            with matrix work
    body    a region with matrix work. Several are alternatives (masked and unmasked block) or
            parts: each is a line of its own, whose percentages are those of base + body
    idle    regions without matrix work (initialisation, write-out), which run once per row of
            blocks: listed, but in no total
    around  bundles of the loops around it (the grid, when the hot loop is inside a kernel)
    static ms     (grid steps x base + executed bodies x body) / clock, over the device's cores; if
                  the hot loop is inside a kernel: grid steps x around + executed x (base + body)
    MXU-bound ms  flops / peak: the least time on this chip
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "LOAD", "FILL", "STORE", "SPILL", "SALU")
PASSES = (
    "packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization"
    "|pre-finalize-registers-and-allocations"
)


@dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Sources: Google Cloud's pages of each version (bf16 peak, HBM bandwidth and size per chip);
    jax._src.pallas.mosaic.tpu_info of jax 0.10.2 (VMEM of a core); arXiv 2304.01433 (clock of v4).
    The other clocks are the peak divided by the products that a cycle of all matrix units makes
    in the compiler's own schedule: 4 x 128 x 128 a core (v5e, v5p), 2 x 2 x 256 x 256 (v6e).

    Attributes:
        topology: smallest slice libtpu describes; cases are compiled for its first device.
        flops: bfloat16 FLOP/s of a chip.
        clock: Hz.
        cores: TensorCores of a chip; one JAX device is a core on v4, a chip elsewhere.
        vmem: bytes of a core.
        hbm, bandwidth: bytes and bytes/s of a chip.
        ici: bytes/s received over all links of a chip.
        delay_slots: bundles after a branch that run anyway, seen in the dumps.
    """

    topology: str
    flops: float
    clock: float
    cores: int
    vmem: int
    hbm: int
    bandwidth: float
    ici: float
    delay_slots: int


GIB = 2**30
CHIPS = {
    "v4": Chip("v4:2x2x1", 275e12, 1.05e9, 2, 16 << 20, 32 * GIB, 1228e9, 300e9, 1),
    "v5e": Chip("v5e:2x2", 197e12, 1.5e9, 1, 128 << 20, 16 * GIB, 819e9, 200e9, 4),
    "v5p": Chip("v5p:2x2x1", 459e12, 1.75e9, 2, 64 << 20, 95 * GIB, 2765e9, 600e9, 4),
    "v6e": Chip("v6e:2x2", 918e12, 1.75e9, 1, 128 << 20, 32 * GIB, 1640e9, 448e9, 4),
}

DEVICELESS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


@dataclass(frozen=True)
class Span:
    """Bundles [start, end) of a program: a loop, or a region that a branch skips."""

    start: int
    end: int
    loop: bool

    def holds(self, other: "Span") -> bool:
        """True if `other` lies inside and is not this span."""
        return self != other and self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class Count:
    """Bundles and the slots they occupy."""

    bundles: int
    slots: tuple[int, ...]

    def __add__(self, other: "Count") -> "Count":
        slots = tuple(a + b for a, b in zip(self.slots, other.slots, strict=True))
        return Count(self.bundles + other.bundles, slots)


NONE = Count(0, (0,) * len(SLOTS))


def spans(program: str, delay_slots: int) -> list[Span]:
    """Loops and predicated regions of a `packed-bundles` dump, outermost first."""
    found: list[Span] = []
    address = 0
    for line in program.splitlines():
        bundle = re.match(r" *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:", line)
        address = int(bundle[1], 16) if bundle else address
        for target in re.findall(r"sbr\.rel.*?target bundleno = (\d+)", line):
            after = address + 1 + delay_slots
            if int(target) <= address:
                found.append(Span(int(target), after, loop=True))
            elif int(target) > after:
                found.append(Span(after, int(target), loop=False))
    return sorted(set(found), key=lambda s: (s.start, -s.end))


def utilization(dump: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Capacity of the slots, and the slots that each bundle occupies."""
    rows = [
        tuple(map(int, line.split())) for line in dump.splitlines() if re.match(r"[ \d]+$", line)
    ]
    rows = [row for row in rows if len(row) == len(SLOTS)]
    return rows[0], rows[1:]


def vmem_bytes(dump: str) -> int:
    """Scoped VMEM of a program: windows with their second buffers, scratch, internal scratch."""
    sizes = re.findall(r"#allocation\d+ \[.*?space=vmem, size = 0x([0-9a-f]+), scoped", dump)
    return sum(int(size, 16) for size in sizes)


def read_program(files: dict[str, Path], chip: Chip) -> dict[str, Any]:
    """Counts of one kernel from its three dumps: hot loop, its bodies and idle regions."""
    program = files["packed-bundles-post-ra"].read_text()
    capacity, rows = utilization(files["pre-delay_hlo-static-per-bundle-utilization"].read_text())
    inside = spans(program, chip.delay_slots)
    loops = [Span(0, len(rows), loop=True), *(s for s in inside if s.loop)]

    def count(span: Span, without: Sequence[Span] = ()) -> Count:
        left = {i for s in without if span.holds(s) for i in range(s.start, s.end)}
        kept = [rows[i] for i in range(span.start, min(span.end, len(rows))) if i not in left]
        return Count(len(kept), tuple(map(sum, zip(*kept, strict=True))) or NONE.slots)

    hot = max(loops, key=lambda loop: count(loop, loops).slots[0])
    nested_loops = [s for s in loops if hot.holds(s)]
    regions = [s for s in inside if not s.loop and hot.holds(s)]
    regions = [s for s in regions if not any(x.holds(s) for x in nested_loops)]
    own = {s: count(s, [*regions, *nested_loops]) for s in regions}
    around = [s for s in regions if any(own[x].slots[0] for x in regions if s.holds(x))]
    parts = [s for s in regions if s not in around]
    base = count(hot, [*nested_loops, *parts])
    bodies = [own[s] for s in parts if own[s].slots[0]]
    return {
        "capacity": capacity,
        "vmem": vmem_bytes(files["pre-finalize-registers-and-allocations"].read_text()),
        "nested_loops": [count(s).bundles for s in nested_loops],
        "around": sum(count(s, loops).bundles for s in loops[1:] if s.holds(hot)),
        "base": base,
        "bodies": bodies + [NONE] * bool(base.slots[0] or not bodies),
        "idle": [own[s].bundles for s in parts if not own[s].slots[0]],
    }


def dumped(folder: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    """Kernel name and its files by pass, for every program with a complete set of dumps."""
    programs: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        found = re.match(rf"(\d+-.+?)-\d+-({PASSES})\.txt$", path.name)
        if found:
            programs.setdefault(found[1], {})[found[2]] = path
    for name, files in programs.items():
        if len(files) == len(PASSES.split("|")):
            yield name.split("-", 1)[1], files


def lines_of(name: str, program: dict[str, Any], compiled: dict, chip: Chip) -> Iterator[dict]:
    """One record for each alternative of a kernel's hot loop."""
    works = [work for part, work in compiled["work"].items() if part in name]
    base: Count = program["base"]
    for body in program["bodies"]:
        total = base + body
        used = zip(SLOTS, total.slots, program["capacity"], strict=True)
        share = {slot: round(100 * n / (total.bundles * most), 1) for slot, n, most in used}
        record = {"kernel": name, "vmem_bytes": program["vmem"]}
        record |= {"base": base.bundles, "body": body.bundles, "idle": program["idle"]}
        record |= {key: program[key] for key in ("around", "nested_loops")}
        record |= {"percent": share}
        record |= {"fills": total.slots[SLOTS.index("FILL")]}
        record |= {"spills": total.slots[SLOTS.index("SPILL")]}
        if works:
            flops, steps, executed = works[0]
            every, each = program["around"], base + body
            if not every:  # the hot loop is the grid itself
                every, each = base.bundles, body
            seconds = (steps * every + executed * each.bundles) / chip.clock
            peak = chip.flops * compiled["cores"] / chip.cores
            record |= {"steps": steps, "executed": executed}
            record |= {"static_ms": round(seconds / compiled["cores"] * 1e3, 3)}
            record |= {"mxu_bound_ms": round(flops / peak * 1e3, 3)}
        yield record


def dump_environment(folder: Path) -> dict[str, str]:
    """Environment in which libtpu compiles without a TPU and writes its programs to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    dump += f" --xla_jf_dump_llo_pass_label_regex={PASSES}|deduplication-map"
    return DEVICELESS | {"LIBTPU_INIT_ARGS": dump}


def mxu_shares(folder: Path, chip_name: str) -> dict[str, float]:
    """Share of matrix-unit slots in the hot loop of every kernel of a dump, by instruction.

    Of a kernel's alternatives the one with the lowest share counts. Equal kernels are compiled
    once; the dump's deduplication map names the others.
    """
    same: dict[str, list[str]] = {}
    for path in folder.glob("*-deduplication-map.txt"):
        for entry in path.read_text().split("key:")[1:]:
            key, *lines = entry.splitlines()
            same[key] = [line.strip() for line in lines if line.startswith("  ")]
    shares = {}
    for name, files in dumped(folder):
        program = read_program(files, CHIPS[chip_name])
        most = program["capacity"][0]
        totals = [program["base"] + body for body in program["bodies"]]
        share = min(total.slots[0] / (total.bundles * most) for total in totals if total.bundles)
        shares |= dict.fromkeys([name, *same.get(name, ())], share)
    return shares


def report(name: str, chip_name: str, keep: str | None = None) -> dict[str, Any]:
    """Compiles one case in a process of its own and reads what libtpu wrote down.

    Args:
        name: a case and its options, `splash-forward:T=8192,block=1024`.
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
            return head | {"error": child.stderr.strip()[-2000:]}
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
    case = CASES[kind](array, **{k: int(v) if v.isdigit() else v for k, v in given.items()})
    try:
        compiled = jax.jit(case.function).lower(*case.args).compile()
    except Exception as error:  # the message is what was asked for
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    text = compiled.as_text() or ""
    instructions = re.findall(r"^ *(?:ROOT )?%(\S+) = .*? (custom-call|fusion)\(", text, re.M)
    custom = [call for call, kind in instructions if kind == "custom-call"]
    memory: Any = compiled.memory_analysis()
    return {
        "calls": custom if case.pallas else [call for call, _ in instructions],
        "work": case.work,
        "cores": device.num_cores,
        "temp_bytes": memory.temp_size_in_bytes,
    }


COLUMNS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "LOAD", "STORE", "SALU")
WORK = ("steps", "executed", "static_ms", "mxu_bound_ms")


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports as text, one line for each alternative of a kernel's hot loop."""
    lines = []
    for r in reports:
        result = r.get("error", f"{r.get('temp_bytes')} bytes of temporaries")
        lines.append(f"{r['case']} on {r['chip']}: {result}")
        for k in r.get("kernels", ()):
            extra = [f" {key} {k[key]}" for key in ("idle", "around", "nested_loops") if k[key]]
            lines.append(f"  {k['kernel']}" + "".join(extra))
            cells = {key: k[key] for key in ("base", "body", "fills", "spills")}
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
