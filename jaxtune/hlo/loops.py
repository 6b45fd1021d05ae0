"""How often the loops of a program run.

XLA says it for CPUs and GPUs. For TPUs it is read from the condition (which compares a counter
with a constant), the counter's first value and what the body adds to it. Of a loop whose end
depends on data the program holds a note (`hlo.notes`).
"""

import math
import re
from collections.abc import Iterator

from jaxtune.hlo import notes
from jaxtune.hlo.text import Computation, Op, Program, root


def trips(program: Program, scope: Computation, loop: Op) -> int | None:
    """Trips of a while instruction of the computation `scope`; None: the text does not say."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    counted = _counted(program, scope, loop)
    return notes.noted_trips(loop.rest) if counted is None else counted


def _counted(program: Program, scope: Computation, loop: Op) -> int | None:
    condition = program.computations[loop.called("condition")]
    limits = [int(op.operands[0]) for op in _constants(program, condition)]
    reads = (op for op in condition.values() if op.kind == "get-tuple-element")
    index = int(re.findall(r"index=(\d+)", next(reads).rest)[0])
    first = _constant(scope, _element(scope, loop.operands[0], index))
    step = _step(program, program.computations[loop.called("body")], index)
    if len(limits) != 1 or first is None or step is None:
        return None
    return max(0, math.ceil((limits[0] - first) / step))


def _constants(program: Program, condition: Computation) -> Iterator[Op]:
    for op in condition.values():
        if op.kind == "constant" and re.fullmatch(r"\d+", op.operands[0]):
            yield op
        elif op.kind in ("fusion", "call"):
            yield from _constants(program, program.inside(op))


def _element(scope: Computation, name: str, index: int) -> str:
    op = scope[name]
    while op.kind in ("copy", "opt-barrier"):
        op = scope[op.operands[0]]
    return op.operands[index] if op.kind == "tuple" else ""


def _behind_copies(scope: Computation, name: str) -> Op | None:
    op = scope.get(name)
    while op is not None and op.kind in ("copy", "bitcast"):
        op = scope.get(op.operands[0])
    return op


def _constant(scope: Computation, name: str) -> int | None:
    op = _behind_copies(scope, name)
    literal = op.operands[0] if op is not None and op.kind == "constant" else ""
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def _step(program: Program, body: Computation, index: int) -> int | None:
    op = _behind_copies(body, _element(body, root(body).name, index))
    if op is not None and op.kind == "fusion":
        body = program.inside(op)
        op = root(body)
    if op is None or op.kind != "add":
        return None
    known = [_constant(body, name) for name in op.operands]
    return next((k for k in known if k is not None), None)
