"""Reads the scheduled HLO text of a program compiled for a TPU, multiplying loops by their trips.

XLA's own cost_analysis counts a loop's body once and knows of a Pallas kernel only what its
cost estimate says. Here every computation is walked in schedule order:

    flops        of convolutions and dots (a TPU program has its matrix products as convolutions),
                 and of kernels by their cost estimate
    collectives  bytes that a device receives (ring formulas), by kind and dtype
    est_ms       kernels and fusions that the matrix units bound cost their static bundle count
                 (tpu_llo), other fusions XLA's `estimated_cycles`; copies to other memories and
                 collectives run beside the rest and are waited for at their end

The estimate compares variants of a program on one chip. It has never been compared with a chip, and
XLA charges elementwise code about 2.5 times what HBM needs for it.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hlo import Op, convolution_flops, dot_flops, parse  # pyright: ignore[reportMissingImports]
from tpu_llo import Chip  # pyright: ignore[reportMissingImports]

HOST_LINK = 16e9  # bytes/s to host memory over PCIe, assumed
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
NO_WORK |= {"opt-barrier", "partition-id", "replica-id", "add-dependency"}

# "sec", "flops", "kernel_sec", "exposed_sec", and bytes received by (kind, dtype).
Totals = dict[Any, float]


class Program:
    """A parsed program and its costs on a chip.

    Attributes:
        ops: instructions by computation and name; `entry` is where it starts.
        chip: of tpu_llo.CHIPS.
        static: seconds of kernels and fusions by the name of the call, filled before `run`.
        dynamic: FLOPs of the loop whose length is only known when it runs (the loss, which goes
            over chunks of trained tokens); it gets as many trips as that takes, by default one.
        unread: loops whose trips are not in the text.
    """

    def __init__(self, text: str, chip: Chip):
        self.ops, self.entry = parse(text)
        self.chip = chip
        self.static: dict[str, float] = {}
        self.dynamic = 0.0
        self.unread: set[str] = set()

    def trips(self, op: Op, computation: str) -> int:
        """Trips of a while loop that counts up to a constant; of another, see `dynamic`."""
        condition = self.ops[op.called("condition")]
        limits = [int(c.operands[0]) for c in self._constants(condition)]
        test = next((o for o in condition.values() if o.root), None)
        index = self._counter(condition)
        first = self._constant(computation, self._element(computation, op.operands[0], index))
        step = self._step(op.called("body"), index)
        if test is None or len(limits) != 1 or first is None or step is None:
            self.unread.add(op.name)
            return max(1, round(self.dynamic / (self.run(op.called("body"))["flops"] or 1)))
        return max(0, math.ceil((limits[0] - first) / step))

    def _constants(self, condition: Mapping[str, Op]) -> Iterator[Op]:
        for op in condition.values():
            if op.kind == "constant" and re.fullmatch(r"\d+", op.operands[0]):
                yield op
            elif op.kind in ("fusion", "call"):
                yield from self._constants(self.ops[op.called("calls") or op.called("to_apply")])

    def _counter(self, condition: Mapping[str, Op]) -> int:
        read = (o for o in condition.values() if o.kind == "get-tuple-element")
        return int(re.findall(r"index=(\d+)", next(read).rest)[0])

    def _element(self, computation: str, name: str, index: int) -> str:
        op = self.ops[computation][name]
        while op.kind in ("copy", "opt-barrier"):
            op = self.ops[computation][op.operands[0]]
        return op.operands[index] if op.kind == "tuple" else ""

    def _constant(self, computation: str, name: str) -> int | None:
        op = self.ops[computation].get(name)
        while op is not None and op.kind in ("copy", "bitcast"):
            op = self.ops[computation].get(op.operands[0])
        literal = op.operands[0] if op is not None and op.kind == "constant" else ""
        return int(literal) if re.fullmatch(r"-?\d+", literal) else None

    def _step(self, body: str, index: int) -> int | None:
        root = next(o for o in self.ops[body].values() if o.root)
        op = self.ops[body].get(self._element(body, root.name, index))
        scope = body
        while op is not None and op.kind in ("copy", "bitcast"):
            op = self.ops[body].get(op.operands[0])
        if op is not None and op.kind == "fusion":
            scope = op.called("calls")
            op = next(o for o in self.ops[scope].values() if o.root)
        if op is None or op.kind != "add":
            return None
        known = [self._constant(scope, name) for name in op.operands]
        return next((k for k in known if k is not None), None)

    def flops(self, computation: str, name: str) -> float:
        """FLOPs of one instruction, fusions included, loops not."""
        op, scope = self.ops[computation][name], self.ops[computation]
        if op.kind == "fusion":
            inner = op.called("calls")
            return sum(self.flops(inner, n) for n in self.ops[inner])
        if op.kind == "convolution":
            return convolution_flops(op, *(scope[n].leaves[0] for n in op.operands[:2]))
        if op.kind == "dot":
            return dot_flops(op, scope[op.operands[0]].leaves[0])
        if "tpu_custom_call" in op.rest:
            estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?([\d.e+]+)', op.rest)
            return float(estimate[1]) if estimate else 0.0
        return 0.0

    def products(self) -> dict[str, float]:
        """FLOPs of the fusions that the matrix units bound, by XLA's estimate, by name."""
        found = {}
        for computation, ops in self.ops.items():
            for op in ops.values():
                flops = self.flops(computation, op.name) if op.kind == "fusion" else 0.0
                if 2 * flops / self.chip.flops > self._seconds(computation, op):
                    found[op.name] = flops
        return found

    def collectives(self, computation: str, name: str) -> list[tuple[str, str, str, float]]:
        """(id, kind, dtype, bytes received) of the collectives in an instruction or fusion."""
        op = self.ops[computation][name]
        if op.kind == "fusion":
            inner = op.called("calls")
            return [c for n in self.ops[inner] for c in self.collectives(inner, n)]
        kind = op.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            return []
        groups = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", op.rest)
        size = 1
        if groups:
            axes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
            size = math.prod(int(axes[a]) for a in re.findall(r"'(\w+)'", groups[2]))
        elif listed := re.search(r"replica_groups=\[\d+,(\d+)\]", op.rest):
            size = int(listed[1])
        elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest):
            size = listed[1].count(",") + 1
        arrays = [leaf for leaf in op.leaves if leaf.dims]
        if op.kind.endswith("-start") and len(arrays) > 1:
            arrays = arrays[len(arrays) // 2 :]  # a tuple of the operands and the results
        factor = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1}
        wire = factor.get(kind, (size - 1) / size if kind != "collective-permute" else 1)
        channel = re.search(r"channel_id=(\d+)", op.rest)
        key = channel[1] if channel else op.name
        return [(key, kind, leaf.dtype, leaf.bytes * wire) for leaf in arrays]

    @functools.cache  # noqa: B019
    def run(self, computation: str) -> Totals:
        """Totals of one execution of a computation."""
        total: Totals = collections.defaultdict(float)
        clock = _Clock(total, self.chip)
        for name, op in self.ops[computation].items():
            if op.kind == "while":
                inner = self.run(op.called("body"))
                trips = self.trips(op, computation)
                _add(total, inner, trips)
            elif op.kind in ("conditional", "call"):
                listed = re.findall(r"branch_computations=\{([^}]*)\}", op.rest)
                names = [n.strip(" %") for n in listed[0].split(",")] if listed else []
                pattern = r"(?:true_computation|false_computation|to_apply)=%?([\w.\-]+)"
                names += re.findall(pattern, op.rest)
                _add(total, max((self.run(n) for n in names), key=lambda t: t["sec"]))
            elif op.kind not in NO_WORK:
                total["flops"] += self.flops(computation, name)
                self._advance(clock, computation, op)
        return total

    def _advance(self, clock: "_Clock", computation: str, op: Op) -> None:
        """Adds one instruction's time; what runs beside the others is begun, or waited for."""
        moved = self.collectives(computation, op.name)
        if op.kind in ("copy-start", "slice-start"):
            host = any(leaf.space == 5 for leaf in op.leaves)
            speed = HOST_LINK if host else self.chip.bandwidth
            clock.begin(op.name, op.leaves[0].bytes / speed, "host" if host else "dma")
        elif op.kind.endswith("-done"):
            clock.end(op.operands[0])
        elif op.kind == "fusion":
            calls = [o.rest for o in self.ops[op.called("calls")].values()]
            starts = any('"AsyncCollectiveStart"' in rest for rest in calls)
            ends = any('"AsyncCollectiveDone"' in rest for rest in calls)
            passing = any("async_collective_fusion_config" in rest for rest in calls)
            if moved and (starts or not (ends or passing)):
                clock.transfer(moved)
            clock.total["sec"] += self._seconds(computation, op)
            if moved and (ends or not (starts or passing)):
                clock.end(moved[0][0])
        else:
            clock.transfer(moved)
            if "tpu_custom_call" in op.rest:
                clock.total["kernel_sec"] += self._seconds(computation, op)
            clock.total["sec"] += self._seconds(computation, op)
            if moved and not op.kind.endswith("-start"):
                clock.end(moved[0][0])

    def _seconds(self, computation: str, op: Op) -> float:
        """Time of one instruction by itself."""
        if op.name in self.static:
            return self.static[op.name]
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        if cycles and int(cycles[1]) < 1e12:  # some are 2**63 - 1
            return int(cycles[1]) / self.chip.clock
        if op.kind.endswith("-start") or op.kind in COLLECTIVES:
            return 0.0
        moved = sum(a.bytes for a in op.leaves if a.space == 0) + sum(
            self._read(computation, op, i) for i in range(len(op.operands))
        )
        return max(moved / self.chip.bandwidth, self.flops(computation, op.name) / self.chip.flops)

    def _read(self, computation: str, op: Op, index: int) -> float:
        """Bytes of an operand that an instruction reads from HBM: of a sliced one, the slice."""
        operand = self.ops[computation].get(op.operands[index])
        if operand is None or op.kind == "dynamic-slice":
            return 0.0
        if op.kind != "fusion":
            return sum(a.bytes for a in operand.leaves if a.space == 0)
        inside = self.ops[op.called("calls")]
        name = next(o.name for o in inside.values() if _is_parameter(o, index))
        users = [(o, i) for o in inside.values() for i, n in enumerate(o.operands) if n == name]
        if users and all(o.kind == "fusion" for o, _ in users):
            return max(self._read(op.called("calls"), o, i) for o, i in users)
        if users and all(o.kind == "dynamic-slice" for o, _ in users):
            return sum(o.leaves[0].bytes for o, _ in users)
        return sum(a.bytes for a in operand.leaves if a.space == 0)


def _is_parameter(op: Op, index: int) -> bool:
    return op.kind == "parameter" and op.operands == (str(index),)


def _add(total: Totals, other: Totals, times: int = 1) -> None:
    for key, value in other.items():
        total[key] += value * times


class _Clock:
    """The time of a computation so far, and what is on its way beside it."""

    def __init__(self, total: Totals, chip: Chip):
        self.total = total
        self.chip = chip
        self.free: dict[str, float] = {}
        self.finish: dict[str, float] = {}

    def begin(self, name: str, seconds: float, link: str) -> None:
        start = max(self.total["sec"], self.free.get(link, 0.0))
        self.free[link] = self.finish[name] = start + seconds

    def transfer(self, moved: list[tuple[str, str, str, float]]) -> None:
        for key, kind, dtype, received in moved:
            self.total[kind, dtype] += received
            self.begin(key, received / self.chip.ici, "ici")

    def end(self, name: str) -> None:
        late = self.finish.pop(name, 0.0) - self.total["sec"]
        if late > 0:
            self.total["sec"] += late
            self.total["exposed_sec"] += late


def summary(program: Program) -> dict[str, Any]:
    """Loop-aware totals of a compiled program."""
    total = program.run(program.entry)
    moved = {key: value for key, value in total.items() if isinstance(key, tuple)}
    calls = {
        o.name for ops in program.ops.values() for o in ops.values() if "tpu_custom_call" in o.rest
    }
    return {
        "tflop": round(total["flops"] / 1e12, 2),
        "est_ms": round(total["sec"] * 1e3, 1),
        "kernel_ms": round(total["kernel_sec"] * 1e3, 1),
        "exposed_ms": round(total["exposed_sec"] * 1e3, 1),
        "bound_ms": round(total["flops"] / program.chip.flops * 1e3, 1),
        "received_gib": {f"{k} {d}": round(v / 2**30, 3) for (k, d), v in moved.items()},
        "kernels_without_estimate": sorted(calls - set(program.static)),
        "unread_loops": sorted(program.unread),
    }
