"""Collectives of a program: what a device receives, and along which axes of the mesh."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtune.hlo.text import Computation, Op, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KINDS += ("ragged-all-to-all", "collective-broadcast")


@dataclass(frozen=True)
class Collective:
    """One array that travels between devices.

    Attributes:
        key: the same at the start and the end of one collective.
        kind: of `KINDS`.
        dtype: of the array.
        received: bytes that a device receives, by ring formulas.
        groups: the devices that exchange [groups, size]; of a permutation [pairs, 2]. A device is
            a place in the flattened mesh.
    """

    key: str
    kind: str
    dtype: str
    received: float
    groups: np.ndarray

    def axes(self, mesh: Mapping[str, int]) -> str:
        """The axes of the mesh along which the devices of a group differ, joined by "+"."""
        places = np.array(np.unravel_index(self.groups, tuple(mesh.values())))
        differs = (places != places[:, :, :1]).any(axis=(1, 2))
        return "+".join(name for name, varies in zip(mesh, differs, strict=True) if varies)


def collectives(program: Program, op: Op, devices: int) -> list[Collective]:
    """What an instruction exchanges, or what the instructions that it fuses or calls do."""
    if op.kind in ("fusion", "async-start", "call-start"):
        inside: Computation = program.inside(op)
        return [c for inner in inside.values() for c in collectives(program, inner, devices)]
    kind = op.kind.removesuffix("-start")
    if kind not in KINDS:
        return []
    groups = device_groups(op.rest, devices)
    size = groups.shape[1]
    if size == 1:
        return []
    channel = re.search(r"channel_id=(\d+)", op.rest)
    key = channel[1] if channel else op.name
    share = _received_share(kind, size)
    return [Collective(key, kind, a.dtype, a.bytes * share, groups) for a in op.results]


def _received_share(kind: str, size: int) -> float:
    """Bytes that each of `size` devices receives, for each byte of the result."""
    if kind == "all-reduce":
        return 2 * (size - 1) / size
    if kind == "reduce-scatter":
        return size - 1
    if kind in ("all-gather", "all-to-all"):
        return (size - 1) / size
    return 1.0


def device_groups(text: str, devices: int) -> np.ndarray:
    """The groups of devices [groups, size] in an instruction's attributes; by default one of all.

    Four forms: mesh['a'=2,'b'=4] {'b'} (with sub-axes 'b':(1)2), [4,2]<=[2,4]T(1,0),
    {{0,1},{2,3}}, and source_target_pairs={{0,1},{1,0}}.
    """
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(([^)]*)\))? *\{([^}]*)\}", text
    ):
        return _of_mesh(*found.groups())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order, turned = (_numbers(part) for part in found.groups(default=""))
        ids = np.arange(math.prod(order)).reshape(order)
        return (ids.transpose(turned) if turned else ids).reshape(shape)
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]+\})\}", text):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _of_mesh(sizes: str, order: str | None, axes: str) -> np.ndarray:
    """Groups along some axes of a mesh, or parts of them: 'b':(1)2 is the major 2 of 'b'."""
    names = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        parts[name].append((int(before or 1), int(size or names[name])))
    shape, chosen = [], []
    for name, whole in names.items():
        done = 1
        for before, size in sorted(parts[name]):
            shape += [before // done, size]
            chosen += [False, True]
            done = before * size
        shape.append(whole // done)
        chosen.append(False)
    ids = np.array(_numbers(order)) if order else np.arange(math.prod(names.values()))
    last = np.argsort(chosen, kind="stable")
    grouped = [n for n, is_chosen in zip(shape, chosen, strict=True) if is_chosen]
    return ids.reshape(shape).transpose(last).reshape(-1, math.prod(grouped))
