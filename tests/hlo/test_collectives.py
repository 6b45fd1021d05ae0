"""Which devices exchange what: the forms in which XLA writes it, and the axes of a mesh."""

import numpy as np
import pytest

from jaxtune.hlo.collectives import Collective, collectives, device_groups
from jaxtune.hlo.text import parse

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], use", [[0, 1], [2, 3]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, use", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, use", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("channel_id=1, replica_groups={}, use", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices(text: str, groups: list[list[int]]):
    assert device_groups(text, 4).tolist() == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], "data+fsdp"),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], "data+fsdp+tensor"),
        ([[0, 4], [4, 0], [1, 5], [5, 1]], "data"),
    ],
)
def test_groups_lie_along_axes_of_the_mesh(groups: list[list[int]], axes: str):
    assert Collective("1", "all-reduce", "f32", 1.0, np.array(groups)).axes(MESH) == axes


HLO = """HloModule step

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %g = f32[32,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %s = f32[2,16]{1,0} reduce-scatter(%x), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %r = (f32[8,16]{1,0}, bf16[4]{0}) all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]
  %p = (f32[8,16],f32[8,16],u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %one = f32[8,16]{1,0} all-gather(%x), channel_id=5, replica_groups=[8,1]<=[8], dimensions={0}
  ROOT %end = f32[8,16]{1,0} copy(%x)
}
"""


def test_bytes_received():
    scope = parse(HLO).computations["main"]
    array = 8 * 16 * 4
    expected = {
        "g": [4 * array * 3 / 4],
        "s": [array / 4 * 3],
        "r": [2 * 7 / 8 * array, 2 * 7 / 8 * 8],
        "p": [array],
        "one": [],
        "end": [],
    }
    for name, sizes in expected.items():
        found = collectives(parse(HLO), scope[name], 8)
        assert [one.received for one in found] == sizes, name
