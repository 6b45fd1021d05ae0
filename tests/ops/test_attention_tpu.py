"""The TPU kernels in interpret mode against the float32 reference."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxtune.ops.attention import blocks, flash, pallas_tpu
from jaxtune.ops.attention.mask import Mask
from jaxtune.ops.attention.pallas_tpu import Held, Sizes
from jaxtune.ops.attention.pallas_tpu_scores import Interpret
from jaxtune.planning.topology import DEVICELESS
from tests import tolerances
from tests.ops import attention_cases

SMALL = Sizes(queries=64, keys=64, part=32)  # several blocks of several parts
PLAIN = Sizes(queries=32, keys=64, part=64)


def interpreted(
    sizes: Sizes, held: int = 128, interpret: Interpret = True
) -> attention_cases.Attend:
    """The implementation, run on CPU, with gradients of `held` keys in VMEM at a time."""
    return functools.partial(
        flash.attend,
        flash.Passes(
            functools.partial(pallas_tpu.forward, sizes=sizes, interpret=interpret),
            functools.partial(
                pallas_tpu.backward, sizes=sizes, held=Held(held), interpret=interpret
            ),
        ),
    )


def check(first: int, count: int, dtype: Any, tolerance: float, **options: Any) -> None:
    """Random cases, in turn with parts and spans, and with neither."""
    for case in attention_cases.cases(count, first=first, dtype=dtype, **options):
        attend = interpreted(SMALL) if case.seed % 4 == 3 else interpreted(PLAIN, held=512)
        attention_cases.check(attend, case, tolerance)


def test_is_the_reference() -> None:
    check(2, 6, jnp.float32, tolerances.OPS, longest=130)


def test_is_the_reference_in_bfloat16() -> None:
    check(1002, 2, jnp.bfloat16, tolerances.OPS_BFLOAT16, longest=130)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_is_the_reference_in_many_cases(first: int) -> None:
    check(first, 20, jnp.float32, tolerances.OPS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1200, 20))
def test_is_the_reference_in_many_cases_in_bfloat16(first: int) -> None:
    check(first, 20, jnp.bfloat16, tolerances.OPS_BFLOAT16)


@pytest.mark.slow
def test_is_the_reference_with_real_head_sizes() -> None:
    check(2000, 12, jnp.bfloat16, tolerances.OPS_BFLOAT16, heads=(64, 80, 128, 256))


@pytest.mark.slow
def test_has_no_races() -> None:
    """A simulated TPU, its copies between memories apart from the computation."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    attend = interpreted(SMALL, interpret=pltpu.InterpretParams(detect_races=True))
    for case in attention_cases.cases(3, first=4, longest=150):
        attention_cases.check(attend, case, tolerances.OPS)
        races = interpret_pallas_call.races
        assert races is not None and not races.races_found, case


def packed(length: int, documents: int) -> np.ndarray:
    """Segment ids [1, length] of a row with padding at its end."""
    random = np.random.default_rng(documents)
    cuts = np.sort(random.choice(np.arange(1, length), documents, replace=False))
    ids = np.zeros((1, length), np.int32)
    for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
        ids[:, start:end] = number
    return ids


@pytest.mark.parametrize("size", [128, 512, 1024])
def test_packed_row_visits_hardly_more_than_it_must(size: int) -> None:
    ids = packed(8192, 16)
    mask = Mask(query_segments=jnp.asarray(ids), key_segments=jnp.asarray(ids))
    some, _ = blocks.seen_blocks(mask, 0, (8192, 8192), (size, size))
    least = blocks.least_blocks(mask, 0, (8192, 8192), (size, size))
    assert not (least & ~np.asarray(some)).any()
    assert np.asarray(some).sum() <= 1.1 * least.sum()


def test_all_is_seen_only_where_it_is() -> None:
    for case in attention_cases.cases(6, longest=150):
        o = case.operands
        lengths = o.q.shape[1], o.k.shape[1]
        some, every = blocks.seen_blocks(o.mask, o.query_offset, lengths, (16, 32))
        least = blocks.least_blocks(o.mask, o.query_offset, lengths, (16, 32))
        assert not (least & ~np.asarray(some)).any(), case
        assert not (np.asarray(every) & ~least).any(), case


COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtune.ops.attention import Mask, make_operands, pallas_tpu

name, known = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = Mesh(np.array(devices[:1]), ("x",))

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def loss(q, k, v, segments):
    mask = Mask(query_segments=segments, key_segments=segments)
    operands = make_operands(q, k, v, mask, softmax_dtype=jnp.bfloat16)
    return pallas_tpu.attend(operands)[0].astype(jnp.float32).sum()

def compile(length, head):
    q, kv = array(1, length, 2, head), array(1, length, 1, head)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    gradient.lower(q, kv, kv, array(1, length, dtype=jnp.int32)).compile()
    print(name, known, length, head, flush=True)

for length, head in [(2048, 64), (2048, 256), (8192, 128), (32768, 64), (32768, 128), (32768, 256)]:
    if known == "unknown":
        compile(length, head)
    elif length > 2048:
        with use_abstract_mesh(mesh.abstract_mesh):
            assert pallas_tpu.vmem_bytes() > 2**24
            compile(length, head)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "vmem"),
    [
        ("v4:2x2x1", "unknown"),
        ("v5e:2x2", "unknown"),
        ("v5p:2x2x1", "unknown"),
        ("v6e:2x2", "unknown"),
        ("v5e:2x2", "known"),
        ("v5p:2x2x1", "known"),
        ("v6e:2x2", "known"),
    ],
)
def test_compiles_for_a_tpu(chip: str, vmem: str) -> None:
    pytest.importorskip("libtpu")
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, chip, vmem],
        env=os.environ | DEVICELESS,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
