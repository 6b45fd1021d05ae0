"""Work and time of programs, on a small text whose counts are known and on programs of our own."""

import jax
import jax.numpy as jnp
import pytest

from jaxtune.hardware import CHIPS, Chip
from jaxtune.hlo import notes
from jaxtune.hlo.timeline import KERNEL_SHARE, Reading, Work, link

V5E = CHIPS["TPU v5 lite"]
HLO = """HloModule step, num_partitions=4

%body (arg: (s32[], f32[8,16], u8[4,32])) -> (s32[], f32[8,16], u8[4,32]) {
  %arg = (s32[], f32[8,16]{1,0}, u8[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %codes = u8[4,32]{1,0} get-tuple-element(%arg), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %whole = u8[16,32]{1,0} all-gather(%codes), replica_groups=[1,4]<=[4], dimensions={0}
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16] convolution(%x, %w), dim_labels=bf_io->bf, config={"estimated_cycles":"1500"}
  ROOT %out = (s32[], f32[8,16]{1,0}, u8[4,32]{1,0}) tuple(%next, %y, %codes)
}

%condition (arg: (s32[], f32[8,16], u8[4,32])) -> pred[] {
  %arg.1 = (s32[], f32[8,16]{1,0}, u8[4,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[8,16], codes: u8[4,32]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = u8[4,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}, u8[4,32]{1,0}) tuple(%zero, %p0, %p1)
  %loop = (s32[], f32[8,16]{1,0}, u8[4,32]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_are_multiplied_by_their_trips():
    reading = Reading(HLO, {"data": 1, "fsdp": 4}, V5E)
    work = reading.work()
    assert work.flops == 7 * 2 * 8 * 16 * 16
    received = 7 * 16 * 32 * 3 / 4
    assert work.received == {("all-gather", "fsdp", "u8"): received}
    assert work.network_seconds == pytest.approx(received / V5E.network)
    assert work.seconds == pytest.approx(7 * 1500 / 1.5e9 + received / V5E.network, rel=1e-3)
    assert work.waiting_seconds == pytest.approx(received / V5E.network, rel=1e-3)
    # In each trip: the product reads x and w and writes y, the gather writes what it receives.
    assert work.memory_bytes == 7 * (2 * 8 * 16 * 4 + 16 * 16 * 4) + received + 7 * 12
    assert not reading.unread_loops


def test_without_a_chip_there_is_work_but_no_time():
    work = Reading(HLO, {"fsdp": 4}).work()
    assert work.flops == 7 * 2 * 8 * 16 * 16 and work.seconds == 0


def test_measured_times_are_taken_first():
    work = Reading(HLO, {"fsdp": 4}, V5E, {"y": 1.0}).work()
    assert work.seconds == pytest.approx(7.0, rel=1e-3)


def test_a_network_within_and_between_hosts():
    gpu = Chip(1.0, 1, 1.0, 100.0, None, 2, 10.0)
    assert link(gpu, _exchange([[0, 1], [2, 3]])) == 100.0
    assert link(gpu, _exchange([[0, 2], [1, 3]])) == 10.0
    assert link(V5E, _exchange([[0, 2], [1, 3]])) == V5E.network


def _exchange(groups: list[list[int]]):
    import numpy as np

    from jaxtune.hlo.collectives import Collective

    return Collective("1", "all-gather", "f32", 1.0, np.array(groups))


def test_work_adds_up():
    one = Work(flops=1.0, seconds=2.0, received={("a", "b", "c"): 3.0})
    both = one + one * 2
    assert both.flops == 3.0 and both.seconds == 6.0
    assert both.received == {("a", "b", "c"): 9.0}


def read(function, *args) -> Reading:
    return Reading(jax.jit(function).lower(*args).compile().as_text(), {"data": 1})


def test_products_in_nested_loops_of_a_compiled_program():
    x, w = jnp.ones((32, 64)), jnp.ones((5, 64, 64))

    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple:
            return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(layer, x, w)[0]

    reading = read(scanned, x, w)
    assert reading.work().flops == 5 * 3 * 2 * 32 * 64 * 64
    assert not reading.unread_loops


def test_a_loop_that_depends_on_data_runs_as_often_as_its_note_says():
    x = jnp.ones((32, 32))

    def looped(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda i, x: jnp.tanh(x @ x), x)

    def noted(x: jax.Array, count: jax.Array) -> jax.Array:
        with notes.at_most(6):
            return looped(x, count)

    once, bare = 2 * 32**3, read(looped, x, jnp.int32(4))
    assert bare.work().flops == once and len(bare.unread_loops) == 1
    found = read(noted, x, jnp.int32(4))
    assert found.work().flops == 6 * once and not found.unread_loops


NAME = "jit(f)/kernel_of_4000000000_flops/pallas_call"
KERNEL = f"""HloModule kernel

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {{
  %x = bf16[64,64] parameter(0)
  ROOT %k = bf16[64,64] custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", op_name="{NAME}"
}}
"""


def test_a_kernel_counts_as_it_says():
    work = Reading(KERNEL, {"data": 1}, CHIPS["NVIDIA H100"]).work()
    assert work.flops == 4e9
    assert work.seconds == work.kernel_seconds == 4e9 / (989e12 * KERNEL_SHARE)


FUSED = """HloModule fused

%named (x.1: bf16[32,32]) -> bf16[1024] {
  %x.1 = bf16[32,32] parameter(0)
  ROOT %flat = bf16[1024] bitcast(%x.1)
}

%doubled (x.2: bf16[32,32]) -> bf16[1024] {
  %x.2 = bf16[32,32] parameter(0)
  %inner = bf16[1024] fusion(%x.2), kind=kLoop, calls=%named
  ROOT %sum = bf16[1024] add(%inner, %inner)
}

ENTRY %main (x: bf16[32,32]) -> bf16[1024] {
  %x = bf16[32,32] parameter(0)
  %part = bf16[16,32] slice(%x), slice={[0:16], [0:32]}
  %whole = bf16[32,32] custom-call(%part, %part), custom_call_target="ConcatBitcast"
  ROOT %y = bf16[1024] fusion(%whole), kind=kLoop, calls=%doubled
}
"""


def test_what_only_names_values_moves_nothing_and_hides_nothing():
    # The slice is read and written, the fusion reads and writes; joining slices costs nothing.
    assert Reading(FUSED, {"data": 1}).work().memory_bytes == 2 * 16 * 32 * 2 + 2 * 1024 * 2
