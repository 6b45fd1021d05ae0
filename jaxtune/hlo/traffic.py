"""Bytes that an instruction moves between a device and its memory."""

from jaxtune.hlo.collectives import KINDS
from jaxtune.hlo.text import Computation, Leaf, Op, Program, root

HBM, HOST = 0, 5  # memory spaces; others are on the chip

# What only names, groups or orders values, and the ends of what was begun before.
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
NO_WORK |= {"opt-barrier", "partition-id", "replica-id", "add-dependency"}
# Calls by which XLA for TPU names buffers and joins the slices of a prefetch.
_NO_WORK_TARGETS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")
_SLICES = ("dynamic-slice", "slice", "gather")


def traffic(program: Program, scope: Computation, op: Op) -> float:
    """Bytes of HBM that one instruction of `scope` reads and writes; of a slice, the slice.

    Nothing for loops, calls and collectives: these write what they receive.
    """
    if op.kind in NO_WORK or op.kind.endswith(("-done", "-update")) or in_flight(op):
        return 0.0
    if op.kind in ("while", "conditional", "call"):
        return 0.0
    if op.kind == "fusion":
        return _of_fusion(program, scope, op)
    if op.kind == "custom-call" and any(f'"{name}"' in op.rest for name in _NO_WORK_TARGETS):
        return 0.0
    if op.kind in _SLICES:
        return 2 * _bytes(op.leaves)
    if op.kind == "dynamic-update-slice":
        return 2 * _of_operands(scope, op.operands[1:2])
    if op.kind.endswith("-start"):
        return _bytes(op.results) + _of_operands(scope, op.operands)
    return _bytes(op.leaves) + _of_operands(scope, op.operands)


def in_flight(op: Op) -> bool:
    """Whether an instruction is a collective, or one end of one that XLA for TPU fused."""
    return op.kind.removesuffix("-start") in KINDS or "AsyncCollective" in op.rest


def host_traffic(op: Op) -> float:
    """Bytes that a copy moves between a device and its host's memory."""
    if op.kind not in ("copy-start", "slice-start", "copy"):
        return 0.0
    return op.leaves[0].bytes if any(leaf.space == HOST for leaf in op.leaves) else 0.0


def _bytes(leaves: list[Leaf]) -> float:
    return sum(leaf.bytes for leaf in leaves if leaf.space == HBM)


def _of_operands(scope: Computation, names: tuple[str, ...]) -> float:
    return sum(_bytes(scope[name].leaves) for name in names if name in scope)


def _of_fusion(program: Program, scope: Computation, op: Op) -> float:
    inside = program.inside(op)
    result = root(inside)
    outputs = [inside[n] for n in result.operands] if result.kind == "tuple" else [result]
    total = 0.0
    for output, leaf in zip(outputs, op.leaves, strict=False):
        passed = output.kind in ("parameter", "get-tuple-element")
        if leaf.space != HBM or passed or in_flight(output):
            continue
        update = _updated(inside, output)
        total += leaf.bytes if update is None else _of_operands(inside, update.operands[1:2])
    numbered = {int(p.operands[0]): p for p in inside.values() if p.kind == "parameter"}
    for i, name in enumerate(op.operands):
        read = _bytes(scope[name].leaves) if name in scope else 0.0
        total += min(read, _read(program, inside, numbered[i].name)) if i in numbered else read
    return total


def _updated(inside: Computation, output: Op) -> Op | None:
    """The update in place that a fusion's result is, if it is one."""
    while output.kind in ("bitcast", "convert", "copy") and output.operands[0] in inside:
        output = inside[output.operands[0]]
    return output if output.kind == "dynamic-update-slice" else None


def _read(program: Program, inside: Computation, name: str) -> float:
    """Bytes that a fusion reads of an operand: no more than its slices, if only they are used."""
    if inside[name].root:
        return _bytes(inside[name].leaves)  # handed on whole, to what reads the inner fusion
    total = 0.0
    for user in inside.values():
        if user.kind == "constant" or name not in user.operands:
            continue
        if user.kind in _SLICES:
            total += _bytes(user.leaves)
        elif user.kind == "bitcast":
            total += _read(program, inside, user.name)
        elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        elif user.kind == "fusion":
            inner = program.inside(user)
            place = str(user.operands.index(name))
            numbered = (p for p in inner.values() if p.kind == "parameter")
            inner_name = next(p.name for p in numbered if p.operands == (place,))
            total += _read(program, inner, inner_name)
        elif user.kind != "tuple" and not in_flight(user):
            return _bytes(inside[name].leaves)
    return total
