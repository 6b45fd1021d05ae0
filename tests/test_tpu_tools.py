"""The reader of libtpu's dumps, on small texts whose counts are known."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module
    sys.modules.pop("tpu_llo", None)


# A grid of 6 trips (bundles 1 to 13); inside it a region of 3 bundles with matrix work, one of 2
# without, and a loop of 4 trips over one bundle. Branches have no delay slots here.
PROGRAM = """
     0   :  { %1 = nop }
   0x1 LB: > { %2 = sld }
   0x2   : > { %3 = sbr.rel (%p1_p0) target bundleno = 6 (0x6), region = 1 }
   0x3   : > { %4 = vmatmul }
   0x4   : > { %5 = vmatmul }
   0x5   : > { %6 = vmatmul }
   0x6 PF: > { %7 = sbr.rel (%p2_p0) target bundleno = 9 (0x9), region = 2 }
   0x7   : > { %8 = vst }
   0x8   : > { %9 = vst }
   0x9 PF: > { %10 = nop }
   0xa LB: >> { %p4_p1 = scmp.ge.s32.totalorder %s2_s2, 4 /* loop exit test */ }
   0xb   : >> { %11 = sbr.rel (!%p4_p1) target bundleno = 10 (0xa), region = 3 }
   0xc   : > { %p3_p1 = scmp.ge.s32.totalorder %s1_s1, 6 /* loop exit test */ }
   0xd   : > { %12 = sbr.rel (!%p3_p1) target bundleno = 1 (0x1), region = 4 }
   0xe   :  { %13 = nop }
"""


def slots(address: int) -> tuple[int, ...]:
    return (2 * (3 <= address < 6), 0, 1, 0, 0, 0, 0, 0, 0, 0)


def test_a_grid_step_is_base_and_body(load: Any):
    llo = load("tpu_llo")
    (grid,) = llo.spans(PROGRAM, [slots(i) for i in range(15)], 0).inside
    assert (grid.start, grid.end, grid.trips) == (1, 14, 6)
    base, bodies, idle = grid.split()
    assert base.bundles == 6 + 4 * 2  # six of its own, an inner loop of two bundles
    assert [(body.bundles, body.matrix) for body in bodies] == [(3, 6)]
    assert idle == [2]


def test_executed_bodies_follow_from_flops(load: Any):
    llo = load("tpu_llo")
    chip = llo.CHIPS["v5e"]
    body, base = llo.Count(3, slots(3)), llo.Count(14, slots(0))
    program = {"capacity": (4,), "trips": 6, "base": base, "bodies": [body]}
    slot = chip.flops / chip.clock / 4
    assert llo.steps(program, 5 * body.matrix * slot, chip) == (6, 5)
    assert llo.steps(program, 50 * body.matrix * slot, chip) == (6, 6)
    assert llo.steps(program, 0, chip) == (6, 6)
    assert llo.steps(program | {"trips": 0}, 9 * body.matrix * slot, chip) == (9, 9)


def test_utilization_and_vmem(load: Any):
    llo = load("tpu_llo")
    dump = "== CAPACTIY:\nMXU, XLU\n    4 3 4 2 1 3 3 1 1 2\n== UTILIZATION:\n0 0 1 0 0 0 0 0 0 2\n"
    assert llo.utilization(dump) == (
        (4, 3, 4, 2, 1, 3, 3, 1, 1, 2),
        [(0, 0, 1, 0, 0, 0, 0, 0, 0, 2)],
    )
    lines = "#allocation{} [shape = 'u8[4]', space={}, size = 0x{}, scoped, tag = 'x']\n"
    dump = lines.format(1, "vmem", "1000") + lines.format(2, "smem", "80")
    assert llo.vmem_bytes(dump) == 4096
