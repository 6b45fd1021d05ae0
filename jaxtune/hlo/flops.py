"""FLOPs of the matrix products of an instruction: 2 for each pair that is multiplied and added."""

import math
import re

import numpy as np

from jaxtune.hlo import notes
from jaxtune.hlo.text import Computation, Leaf, Op, Program


def flops(program: Program, scope: Computation, op: Op) -> float:
    """FLOPs of one instruction of the computation `scope`, with what it fuses; of a loop 0.

    A kernel counts as its cost estimate or its note says.
    """
    if op.kind == "fusion":
        inside = program.inside(op)
        return sum(flops(program, inside, inner) for inner in inside.values())
    if op.kind == "convolution":  # XLA for TPU makes products into convolutions
        return _of_convolution(op, *(scope[name].leaves[0] for name in op.operands[:2]))
    if op.kind == "dot":
        return _of_dot(op, scope[op.operands[0]].leaves[0])
    if is_kernel(op):
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?([\d.e+]+)', op.rest)
        return float(estimate[1]) if estimate else notes.noted_flops(op.rest) or 0.0
    return 0.0


def is_kernel(op: Op) -> bool:
    """Whether an instruction calls a Pallas kernel."""
    return op.kind == "custom-call" and bool(
        re.search(r'custom_call_target="(tpu_custom_call|[^"]*xla\.gpu\.triton)"', op.rest)
    )


def _of_dot(op: Op, left: Leaf) -> float:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    contracted = [left.dims[int(a)] for a in axes[1].split(",") if a] if axes else []
    return 2 * math.prod(op.leaves[0].dims) * math.prod(contracted)


def _of_convolution(op: Op, left: Leaf, right: Leaf) -> float:
    """Batch dimensions of a product appear as padded, dilated windows."""
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
