"""HLO text of a compiled program: computations and their instructions, in schedule order."""

import functools
import math
import re
from dataclasses import dataclass

BITS = {"pred": 8, "token": 0, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclass(frozen=True)
class Leaf:
    """One array of a shape: S(0) is HBM, S(1) VMEM, S(5) the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Bytes without the padding of tiles."""
        bits = BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 0)
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Op:
    """One instruction; `operands` are names (of a constant or parameter: its text)."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        """The arrays of the result."""
        found = re.findall(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?", self.shape)
        return [
            Leaf(
                dtype,
                tuple(int(d.replace("<=", "")) for d in dims.split(",") if d.strip()),
                int((re.findall(r"S\((\d+)\)", layout) or [0])[0]),
            )
            for dtype, dims, layout in found
        ]

    @property
    def results(self) -> list[Leaf]:
        """The arrays that it makes; the start of an asynchronous one lists its operands before."""
        count = len(self.operands)
        arrays = [leaf for leaf in self.leaves if leaf.space not in (2, 4)]  # semaphores, flags
        if self.kind.endswith("-start") and len(arrays) >= 2 * count:
            return arrays[count : 2 * count]
        return self.leaves

    def called(self, key: str) -> str:
        """The computation that an attribute such as `body` names; "" without the attribute."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Op]


@dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
        computations: instructions by name in schedule order, by the computation's name.
        entry: where it starts.
    """

    computations: dict[str, Computation]
    entry: str

    def inside(self, op: Op) -> Computation:
        """What a fusion, a call or an asynchronous start runs; empty for other instructions."""
        return self.computations.get(op.called("calls") or op.called("to_apply"), {})


def root(computation: Computation) -> Op:
    """The instruction that makes a computation's result."""
    return next(op for op in computation.values() if op.root)


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and line.startswith("  "):
            op = _parse_op(line)
            if op:
                computations[current][op.name] = op
    return Program(computations, entry)


def _parse_op(line: str) -> Op | None:
    head = re.match(r"  (ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    kind = re.match(r" ?([\w\-]+)\(", line[end:])
    if not kind:
        return None
    opening = end + kind.end() - 1
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    names = tuple(re.findall(r"%([\w.\-]+)", inside))
    operands = (inside,) if kind[1] in ("constant", "parameter") else names
    return Op(head[2], line[start:end], kind[1], operands, line[closing + 1 :], bool(head[1]))


def _closing(line: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i
    return len(line) - 1
