"""VLIW programs of TPU kernels, which libtpu writes down when it compiles, TPU or not.

Under `dump_environment` libtpu leaves files for each program; three of them are read:

    packed-bundles-post-ra        the program after register allocation: loops, branches, addresses
    pre-delay_..-utilization      slots that each bundle occupies (MXU, XLU, VALU ...), capacities
    pre-finalize-..-allocations   VMEM: windows (both buffers), scratch and the compiler's own

How a grid step is counted. The grid is one loop of the program, with two trips more than steps that
fill and drain its pipeline; trips of every loop are read from its exit test (0: that is no
constant). What `pl.when` and `lax.cond` guard is a region that a forward branch skips, and how
often it runs is not in the program:

    base    bundles of every grid step: outside such regions, and those of regions around other ones
            with matrix work; inner loops times their trips
    body    a region with matrix work. Several are alternatives (masked and unmasked block): each is
            a line of its own, whose percentages are those of base + body
    idle    regions without matrix work (initialisation, write-out), which run once per row of
            blocks: listed, but in no total

A bundle is one cycle if nothing stalls. Bundles are counted before the pass that folds empty ones
into delay fields, so that waiting for the matrix unit counts; the later `final_bundles` dump is
shorter and would flatter a kernel. In no number: stalls on HBM, and DMA that the pipeline hides.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune import hardware
from jaxtune.hlo import flops as hlo_flops
from jaxtune.hlo.text import parse
from jaxtune.planning.topology import DEVICELESS

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "LOAD", "FILL", "STORE", "SPILL", "SALU")
PASSES = (
    "packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization"
    "|pre-finalize-registers-and-allocations"
)


@dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
        topology: smallest slice libtpu describes; cases are compiled for its first device.
        sheet: the data sheet. Its clock is the peak divided by the products that a cycle of all
            matrix units makes in the compiler's own schedule: 4 x 128 x 128 a core (v5e, v5p),
            2 x 2 x 256 x 256 (v6e).
        cores: TensorCores of a chip; one JAX device is a core on v4, a chip elsewhere.
        delay_slots: bundles after a branch that run anyway, seen in the dumps.
    """

    topology: str
    sheet: hardware.Chip
    cores: int
    delay_slots: int

    @property
    def flops(self) -> float:
        """Bfloat16 FLOP/s of a chip."""
        return self.sheet.flops

    @property
    def clock(self) -> float:
        """Hz."""
        assert self.sheet.clock is not None, "of a TPU it is known"
        return self.sheet.clock


CHIPS = {
    "v4": Chip("v4:2x2x1", hardware.CHIPS["TPU v4"], 2, 1),
    "v5e": Chip("v5e:2x2", hardware.CHIPS["TPU v5 lite"], 1, 4),
    "v5p": Chip("v5p:2x2x1", hardware.CHIPS["TPU v5"], 2, 4),
    "v6e": Chip("v6e:2x2", hardware.CHIPS["TPU v6 lite"], 1, 4),
}


@dataclass(frozen=True)
class Count:
    """Bundles and the slots they occupy."""

    bundles: int = 0
    slots: tuple[int, ...] = (0,) * len(SLOTS)

    def __add__(self, other: "Count") -> "Count":
        slots = tuple(a + b for a, b in zip(self.slots, other.slots, strict=True))
        return Count(self.bundles + other.bundles, slots)

    def __mul__(self, times: int) -> "Count":
        return Count(self.bundles * times, tuple(times * n for n in self.slots))

    @property
    def matrix(self) -> int:
        """Slots of the matrix units."""
        return self.slots[0]


@dataclass
class Span:
    """Bundles [start, end) of a program: a loop, or a region that a branch skips.

    Attributes:
        trips: of a loop, 0 if its exit test is not against a constant; None for a region.
        own: what is in no span inside.
        inside: the spans inside.
    """

    start: int
    end: int
    trips: int | None
    own: Count = Count()
    inside: "list[Span]" = dataclasses.field(default_factory=list)

    def loops(self) -> Count:
        """The loops directly inside, times their trips."""
        loops = [(span, span.trips) for span in self.inside if span.trips is not None]
        return sum((span.hot() * max(trips, 1) for span, trips in loops), Count())

    def hot(self) -> Count:
        """What runs when matrix work is done: of alternative regions the longest, no idle ones."""
        bodies = [span.hot() for span in self.regions() if span.hot().matrix]
        longest = max(bodies, key=lambda body: (body.matrix, body.bundles), default=Count())
        return self.own + self.loops() + longest

    def regions(self) -> "list[Span]":
        """The regions directly inside."""
        return [span for span in self.inside if span.trips is None]

    def outer_loops(self) -> "list[Span]":
        """The loops inside that are in no other loop inside."""
        regions = (loop for span in self.regions() for loop in span.outer_loops())
        return [*(span for span in self.inside if span.trips is not None), *regions]

    def split(self) -> tuple[Count, list[Count], list[int]]:
        """(base, bodies, bundles of idle regions), as the module's docstring defines them."""
        base, bodies, idle = self.own + self.loops(), [], []
        for span in self.regions():
            if any(region.hot().matrix for region in span.regions()):
                around, inner, unused = span.split()
                base, bodies, idle = base + around, bodies + inner, idle + unused
            elif span.hot().matrix:
                bodies.append(span.hot())
            else:
                idle.append(span.end - span.start)
        return base, bodies, idle


def spans(program: str, rows: Sequence[tuple[int, ...]], delay_slots: int) -> Span:
    """The whole program as a span, from a `packed-bundles` dump and the slots of its bundles."""
    tests = dict(re.findall(r"(%p\w+) = scmp\.ge\.s32\S* \S+ (\d+) /\* loop exit test", program))
    found: dict[tuple, Span] = {}
    address = 0
    for line in program.splitlines():
        bundle = re.match(r" *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:", line)
        address = int(bundle[1], 16) if bundle else address
        for test, to in re.findall(r"sbr\.rel (?:\(!?(%p\w+)\))?.*?target bundleno = (\d+)", line):
            after = address + 1 + delay_slots
            if int(to) <= address:
                found[int(to), after, "loop"] = Span(int(to), after, int(tests.get(test, 0)))
            elif int(to) > after:
                found.setdefault((after, int(to)), Span(after, int(to), None))
    whole = Span(0, len(rows), None)
    path = [whole]
    for span in sorted(found.values(), key=lambda s: (s.start, -s.end, s.trips is not None)):
        while path[-1].end < span.end:
            path.pop()
        path[-1].inside.append(span)
        path.append(span)
    for span in [whole, *found.values()]:
        taken = {i for s in span.inside for i in range(s.start, s.end)}
        own = [rows[i] for i in range(span.start, min(span.end, len(rows))) if i not in taken]
        span.own = Count(len(own), tuple(map(sum, zip(*own, strict=True))) or Count().slots)
    return whole


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
    """What one kernel's three dumps say about its grid loop."""
    capacity, rows = utilization(files["pre-delay_hlo-static-per-bundle-utilization"].read_text())
    whole = spans(files["packed-bundles-post-ra"].read_text(), rows, chip.delay_slots)
    loops = whole.outer_loops()
    grid = max(loops, key=lambda loop: loop.hot().matrix * max(loop.trips or 1, 1), default=whole)
    base, bodies, idle = grid.split()
    return {
        "capacity": capacity,
        "vmem": vmem_bytes(files["pre-finalize-registers-and-allocations"].read_text()),
        "trips": 1 if grid is whole else grid.trips,
        "base": base,
        "bodies": bodies + [Count()] * bool(base.matrix or not bodies),
        "idle": idle,
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


def dump_environment(folder: Path) -> dict[str, str]:
    """Environment in which libtpu compiles without a TPU and writes its programs to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    dump += f" --xla_jf_dump_llo_pass_label_regex={PASSES}|deduplication-map"
    return DEVICELESS | {"LIBTPU_INIT_ARGS": dump}


def kernel_flops(text: str) -> dict[str, float]:
    """FLOPs by the cost estimate (0: none) of each Pallas call in an HLO text, by its name."""
    program = parse(text)
    return {
        op.name: hlo_flops.flops(program, scope, op)
        for scope in program.computations.values()
        for op in scope.values()
        if hlo_flops.is_kernel(op)
    }


def steps(program: dict[str, Any], flops: float, chip: Chip) -> tuple[int, int]:
    """Trips of a kernel's grid, and how many of them execute the longest body, from its FLOPs.

    A grid whose length is only known when it runs has as many trips as bodies. Right where every
    matrix-unit slot does full work: on v6e a product that contracts over 128, as attention's with
    heads of 128, uses half of one.
    """
    body = max((count.matrix for count in program["bodies"]), default=0)
    base, trips = program["base"].matrix, program["trips"]
    slots = flops / (chip.flops / chip.cores / chip.clock / program["capacity"][0])
    if not trips:
        trips = max(1, round(slots / max(1, base + body)))
    executed = round((slots - trips * base) / body) if body and flops else trips
    return trips, min(trips, executed)


def kernel_seconds(folder: Path, chip_name: str, flops: Mapping[str, float]) -> dict[str, float]:
    """Static time of the kernels in a dump, by HLO instruction.

    A grid step costs its base and, as often as `flops` say, the longest body; in the other steps
    the shorter ones and the idle regions. Equal kernels are compiled once; the dump's
    deduplication map names the others.

    Args:
        folder: of the dump.
        chip_name: of CHIPS.
        flops: of one call, by instruction; 0: every step executes the longest body.
    """
    chip = CHIPS[chip_name]
    same: dict[str, list[str]] = {}
    for path in folder.glob("*-deduplication-map.txt"):
        for entry in path.read_text().split("key:")[1:]:
            key, *lines = entry.splitlines()
            same[key] = [line.strip() for line in lines if line.startswith("  ")]
    seconds = {}
    for name, files in dumped(folder):
        if not flops.keys() & {name, *same.get(name, ())}:
            continue
        program = read_program(files, chip)
        bodies = sorted(body.bundles for body in program["bodies"])
        trips, executed = steps(program, flops.get(name, 0.0), chip)
        cycles = trips * program["base"].bundles + executed * bodies[-1]
        cycles += (trips - executed) * (sum(bodies[:-1]) + sum(program["idle"]))
        seconds |= {call: cycles / chip.clock for call in (name, *same.get(name, ()))}
    return seconds
