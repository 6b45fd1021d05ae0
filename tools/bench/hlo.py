"""HLO text of a compiled program: computations, their instructions, the FLOPs of one."""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np

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

    def called(self, key: str) -> str:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Computations (instructions by name, in schedule order) and the name of the entry."""
    computations: dict[str, dict[str, Op]] = {}
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
    return computations, entry


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


def convolution_flops(op: Op, left: Leaf, right: Leaf) -> float:
    """FLOPs of a convolution; batch dimensions of a product appear as padded, dilated windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    assert labels is not None, op.rest[:200]
    l_labels, r_labels, o_labels = labels.groups()
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.findall(r"window=\{(.*?)\}", op.rest) or [""])[0])
    )
    out, pairs = op.leaves[0].dims, 1
    for axis in sorted(label for label in o_labels if label.isdigit()):
        size, taps = left.dims[l_labels.index(axis)], right.dims[r_labels.index(axis)]

        def field(name: str, default: str, axis: str = axis) -> int:
            values = window.get(name, "").split("x")
            return int((values[int(axis)] if values != [""] else default).split("_")[0])

        outputs = np.arange(out[o_labels.index(axis)])[:, None] * field("stride", "1")
        place = outputs + np.arange(taps) * field("rhs_dilate", "1") - field("pad", "0_0")
        dilation = field("lhs_dilate", "1")
        inside = (place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)
        pairs *= int(inside.sum())
    groups = int((re.findall(r"batch_group_count=(\d+)", op.rest) or ["1"])[0])
    features = out[o_labels.index("b")] * out[o_labels.index("f")] * right.dims[r_labels.index("i")]
    return 2 * features * pairs / groups


def dot_flops(op: Op, left: Leaf) -> float:
    """FLOPs of a dot."""
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    contracted = [left.dims[int(a)] for a in axes[1].split(",") if a] if axes else []
    return 2 * math.prod(op.leaves[0].dims) * math.prod(contracted)
