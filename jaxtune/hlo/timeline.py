"""What a program costs one device, and an estimate of its time; nothing runs.

Every computation is walked in schedule order, loops times their trips. A fusion that XLA for TPU
has counted costs its `estimated_cycles`; every other instruction the longer of its products at the
chip's peak and its bytes at the memory's bandwidth. Collectives and copies that the schedule starts
ahead run beside the rest, one at a time, and are waited for where they end.

The estimate compares programs for one kind of chip; it has not been compared with a chip. XLA for
TPU charges elementwise code about 2.5 times what its bytes take.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxtune.hardware import Chip
from jaxtune.hlo import loops
from jaxtune.hlo.collectives import Collective, collectives
from jaxtune.hlo.flops import flops, is_kernel
from jaxtune.hlo.text import Computation, Op, Program, parse
from jaxtune.hlo.traffic import NO_WORK, host_traffic, traffic

HOST_LINK = 16e9  # bytes/s to host memory over PCIe, assumed
KERNEL_SHARE = 0.6  # of the peak, that products in a Pallas kernel are assumed to reach

# Bytes that a device receives, by (kind, axes, dtype).
Received = Mapping[tuple[str, str, str], float]


@dataclass(frozen=True)
class Work:
    """What one device does, in a computation or a step.

    Attributes:
        flops: of matrix products, with those that are computed again.
        memory_bytes: read from and written to its memory.
        host_bytes: between its memory and its host's.
        seconds: the estimate; 0 without a chip.
        waiting_seconds: of these, waiting for collectives and copies.
        kernel_seconds: of these, in Pallas kernels.
        network_seconds: that its collectives take by themselves.
        received: see `Received`.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    host_bytes: float = 0.0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    kernel_seconds: float = 0.0
    network_seconds: float = 0.0
    received: Received = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        received = collections.Counter(self.received)
        received.update(other.received)
        numbers = zip(self._numbers(), other._numbers(), strict=True)
        return Work(*(a + b for a, b in numbers), received=received)

    def __mul__(self, times: int) -> "Work":
        received = {key: times * value for key, value in self.received.items()}
        return Work(*(times * number for number in self._numbers()), received=received)

    def _numbers(self) -> list[float]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)[:-1]]


class Reading:
    """A compiled program, and what it costs.

    Attributes:
        program: its parsed text.
        unread_loops: loops whose trips the text does not say, after `work`; each counts once.
    """

    def __init__(
        self,
        text: str,
        mesh: Mapping[str, int],
        chip: Chip | None = None,
        static: Mapping[str, float] | None = None,
    ):
        """Reads `compiled.as_text()`.

        Args:
            text: scheduled HLO.
            mesh: sizes of the mesh's axes, by name.
            chip: whose speeds time is estimated with; None: no times.
            static: seconds of instructions that are known better, by name.
        """
        self.program: Program = parse(text)
        self.unread_loops: set[str] = set()
        self._mesh, self._chip, self._static = mesh, chip, static or {}
        self._devices = math.prod(mesh.values())
        self._known: dict[str, Work] = {}

    def work(self) -> Work:
        """What a step costs a device."""
        return self._work(self.program.entry)

    def _work(self, name: str) -> Work:
        if name not in self._known:
            self._known[name] = self._walk(self.program.computations[name])
        return self._known[name]

    def _walk(self, scope: Computation) -> Work:
        line = _Line(self._chip)
        for op in scope.values():
            if op.kind == "while":
                trips = loops.trips(self.program, scope, op)
                if trips is None:
                    self.unread_loops.add(op.name)
                line.spend(self._work(op.called("body")) * (1 if trips is None else trips))
            elif op.kind in ("conditional", "call"):
                branches = [self._work(name) for name in _branches(op)]
                line.spend(max(branches, key=lambda work: (work.seconds, work.flops)))
            elif op.kind.endswith("-done"):
                line.wait(op.operands[0])
            elif op.kind not in NO_WORK:
                self._advance(line, scope, op)
        return line.work

    def _advance(self, line: "_Line", scope: Computation, op: Op) -> None:
        """Adds one instruction; what runs beside the others is begun, or waited for."""
        moved = collectives(self.program, op, self._devices)
        if host_traffic(op) or op.kind in ("copy-start", "slice-start"):
            line.copy(op.name, traffic(self.program, scope, op), host_traffic(op))
            if not op.kind.endswith("-start"):
                line.wait(op.name)
            return
        begins, ends = self._role(op)
        if moved and begins:
            line.transfer(op.name, moved, self._mesh)
        line.spend(self._instruction(scope, op))
        if moved and ends:
            line.wait(moved[0].key)

    def _role(self, op: Op) -> tuple[bool, bool]:
        """Whether the collective of an instruction begins in it, and whether it ends in it.

        XLA for TPU spreads one over several fusions: it starts in one, goes on beside the products
        of others, and is done in a last one.
        """
        if op.kind != "fusion":
            return True, not op.kind.endswith("-start")
        texts = [inner.rest for inner in self.program.inside(op).values()]
        starts = any('"AsyncCollectiveStart"' in text for text in texts)
        done = any('"AsyncCollectiveDone"' in text for text in texts)
        goes_on = any("async_collective_fusion_config" in text for text in texts)
        alone = not (starts or done or goes_on)
        return starts or alone, done or alone

    def _instruction(self, scope: Computation, op: Op) -> Work:
        """Cost of one instruction by itself."""
        products, moved = flops(self.program, scope, op), traffic(self.program, scope, op)
        chip, kernel, cycles = self._chip, is_kernel(op), _cycles(op)
        if chip is None:
            seconds = 0.0
        elif op.name in self._static:
            seconds = self._static[op.name]
        elif cycles is not None and chip.clock is not None:
            seconds = cycles / chip.clock
        else:
            peak = chip.flops * (KERNEL_SHARE if kernel else 1.0)
            seconds = max(products / peak, moved / chip.bandwidth)
        return Work(
            flops=products,
            memory_bytes=moved,
            seconds=seconds,
            kernel_seconds=seconds if kernel else 0.0,
        )

    def products(self) -> dict[str, float]:
        """FLOPs of the fusions that XLA's cycles say the matrix units bound, by name."""
        found, chip = {}, self._chip
        assert chip is not None and chip.clock is not None
        for scope in self.program.computations.values():
            for op in (op for op in scope.values() if op.kind == "fusion"):
                count, cycles = flops(self.program, scope, op), _cycles(op)
                if cycles is not None and 2 * count / chip.flops > cycles / chip.clock:
                    found[op.name] = count
        return found


def _cycles(op: Op) -> int | None:
    """XLA's estimate, which for some instructions is 2**63 - 1."""
    found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
    return int(found[1]) if found and int(found[1]) < 1e12 else None


def _branches(op: Op) -> Iterable[str]:
    listed = re.findall(r"branch_computations=\{([^}]*)\}", op.rest)
    names = [name.strip(" %") for name in listed[0].split(",")] if listed else []
    return names + re.findall(
        r"(?:true_computation|false_computation|to_apply)=%?([\w.\-]+)", op.rest
    )


class _Line:
    """The work of a computation so far, and what is on its way beside it."""

    def __init__(self, chip: Chip | None):
        self.work = Work()
        self._chip = chip
        self._free: dict[str, float] = {}  # when a link has done what it was given
        self._finish: dict[str, float] = {}

    def spend(self, work: Work) -> None:
        self.work += work

    def copy(self, name: str, moved: float, to_host: float) -> None:
        self.spend(Work(memory_bytes=moved, host_bytes=to_host))
        if self._chip is not None and to_host:
            self._begin(name, to_host / HOST_LINK, "host")
        elif self._chip is not None:
            self._begin(name, moved / self._chip.bandwidth, "memory")

    def transfer(self, name: str, moved: list[Collective], mesh: Mapping[str, int]) -> None:
        for one in moved:
            received = {(one.kind, one.axes(mesh), one.dtype): one.received}
            seconds = one.received / link(self._chip, one) if self._chip is not None else 0.0
            self.spend(Work(memory_bytes=one.received, network_seconds=seconds, received=received))
            self._begin(one.key, seconds, "network")
        self._finish[name] = self._finish.get(moved[-1].key, 0.0)

    def wait(self, name: str) -> None:
        late = self._finish.pop(name, 0.0) - self.work.seconds
        if late > 0:
            self.spend(Work(seconds=late, waiting_seconds=late))

    def _begin(self, name: str, seconds: float, over: str) -> None:
        start = max(self.work.seconds, self._free.get(over, 0.0))
        self._free[over] = self._finish[name] = start + seconds


def link(chip: Chip, one: Collective) -> float:
    """Bytes/s at which a collective travels: the slower network if a group spans hosts."""
    if chip.host_devices is None or chip.between_hosts is None:
        return chip.network
    hosts = one.groups // chip.host_devices
    return chip.between_hosts if (hosts != hosts[:, :1]).any() else chip.network
