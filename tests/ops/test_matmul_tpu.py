"""The fused kernels of quantized products: values in the interpreter, compiles for real TPUs."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxtune import ops
from jaxtune.ops.matmul import grouped_tpu, pallas_tpu
from jaxtune.planning.topology import DEVICELESS
from jaxtune.quant import quantize
from tests import oracle, tolerances
from tests.ops import matmul_cases

MATMUL = functools.partial(ops.matmul, implementation="pallas_tpu")
ADAPTED = functools.partial(ops.adapted_matmul, implementation="pallas_tpu")


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Interpreted kernels with small blocks, so that small products have several of each."""
    monkeypatch.setattr(pallas_tpu, "BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "ROWS", 256)
    monkeypatch.setattr(pallas_tpu, "CHUNK", 128)

    def use(how: Any) -> None:
        for name in ("forward", "transposed"):
            plain = functools.partial(getattr(pallas_tpu, name), interpret=how)
            monkeypatch.setattr(pallas_tpu, name, plain)

    return use


def test_values_and_gradients(interpret: Any):
    interpret(True)
    for case in matmul_cases.cases(4, longest=300, widest=300):
        matmul_cases.check(MATMUL, ADAPTED, case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_values_and_gradients(seed: int, interpret: Any):
    interpret(True)
    for case in matmul_cases.cases(28, longest=600, widest=600, seed=seed + 1):
        matmul_cases.check(MATMUL, ADAPTED, case)


@pytest.mark.slow
def test_has_no_races(interpret: Any):
    """A simulated TPU, its copies between memories apart from the computation."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    interpret(pltpu.InterpretParams(detect_races=True))
    for case in matmul_cases.cases(4, longest=300, widest=300, seed=9):
        matmul_cases.check(MATMUL, ADAPTED, case)
        races: Any = interpret_pallas_call.races
        assert not races.races_found, case.label


def test_groups_that_split_a_strip_are_refused():
    kernel, x = jnp.ones((64, 128)), jnp.ones((8, 64))
    w = quantize(kernel, "int8_block", block_size=16)
    with pytest.raises(NotImplementedError, match="scales of 16 rows"):
        jax.eval_shape(MATMUL, x, w)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((5, 0, 7), (12, 8, 5)),
        ((0, 130, 3, 0, 67, 0), (300, 72, 40)),  # rows of nobody
        ((384, 128, 0), (512, 33, 130)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_gradients_of_groups(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, sizes: tuple[int, ...], shape: tuple[int, int, int]
):
    interpreted = functools.partial(grouped_tpu.outer, interpret=True)
    monkeypatch.setattr(grouped_tpu, "outer", interpreted)
    monkeypatch.setattr(grouped_tpu, "BLOCK", (32, 128))
    m, d, f = shape
    keys = jax.random.split(jax.random.key(m), 2)
    x, g = (jax.random.normal(k, (m, n), dtype) for k, n in zip(keys, (d, f), strict=True))
    counts = jnp.array(sizes, jnp.int32)

    def gradient(implementation: str) -> jax.Array:
        def y(w: jax.Array) -> jax.Array:
            return ops.grouped_matmul(x, w, counts, implementation=implementation)

        return jax.vjp(y, jnp.zeros((len(sizes), d, f), jnp.float32))[1](g)[0]

    got, expected = gradient("pallas_tpu"), gradient("xla")
    assert got.dtype == expected.dtype == jnp.float32
    assert oracle.difference(got, expected) <= tolerances.OPS


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize(
    "size", [(2048, 4096, 14336), (2048, 14336, 4096), (8192, 8192, 28672), (100, 576, 1536)]
)
def test_blocks_fit_the_smallest_vmem(size: tuple[int, int, int], format: str, transposed: bool):
    m, d, f = size
    w = jax.eval_shape(lambda: quantize(jnp.zeros((d, f), jnp.bfloat16), format))
    x = jax.ShapeDtypeStruct((m, f if transposed else d), jnp.bfloat16)
    plan = pallas_tpu.make_plan(x, w, 16, transposed)
    assert plan.vmem <= pallas_tpu.VMEM
    # Decoding is a small part of the work only if many rows share a decoded tile.
    assert plan.bm >= min(m, 1024)


COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtune import ops
from jaxtune.quant import FORMATS, quantize

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )

def product(x, w):
    return ops.matmul(x, w, implementation="pallas_tpu")

def gradient(x, w, g):
    return jax.vjp(lambda x: product(x, w), x)[1](g)

def adapted(x, w, a, b, g):
    def y(x, a, b):
        return ops.adapted_matmul(x, w, a, b, implementation="pallas_tpu")
    return jax.vjp(y, x, a, b)[1](g)

def compile(m, d, f, format, double_quant=False, dtype=jnp.bfloat16, rank=0):
    def arrays():
        w = quantize(jnp.zeros((d, f)), format, double_quant=double_quant)
        return jnp.zeros((m, d), dtype), w, jnp.zeros((m, f), dtype)
    x, w, g = abstract(jax.eval_shape(arrays))
    for function, args in ((product, (x, w)), (gradient, (x, w, g))):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        # Only on v5p, why is not known: 136 KiB for nested scales, and copies of operands whose
        # width is no multiple of a tile.
        odd = double_quant or min(d, f) % 128
        limit = 2**18 + 3 * m * (d + f) if odd and sys.argv[1].startswith("v5p") else 0
        assert memory.temp_size_in_bytes <= limit, (m, d, f, format, memory.temp_size_in_bytes)
    if rank:
        pair = abstract((jax.ShapeDtypeStruct((d, rank), jnp.float32),
                         jax.ShapeDtypeStruct((rank, f), jnp.float32)))
        jax.jit(adapted).lower(x, w, *pair, g).compile()

def compile_groups(m, d, f, groups, dtype=jnp.bfloat16):
    def gradient(x, w, sizes, g):
        def y(w):
            return ops.grouped_matmul(x, w, sizes, implementation="pallas_tpu")
        return jax.vjp(y, w)[1](g)
    shapes = ((m, d), dtype), ((groups, d, f), jnp.float32), ((groups,), jnp.int32), ((m, f), dtype)
    given = abstract([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    flops = jax.jit(gradient).lower(*given).compile().cost_analysis()["flops"]
    assert flops < 1.1 * 2 * m * d * f, (m, d, f, groups, flops)

compile_groups(16384, 4096, 14336, 8)
compile_groups(16384, 4096, 14336, 8, jnp.float32)
compile_groups(16384, 2048, 16, 128)
compile_groups(16384, 16, 768, 128)
for format in FORMATS:
    compile(2048, 4096, 14336, format)
compile(2048, 4096, 14336, "nf4", double_quant=True, rank=16)
compile(2048, 14336, 4096, "nf4", rank=64)
compile(2048, 14336, 4096, "int8")
compile(4096, 8192, 28672, "nf4", rank=16)
compile(2048, 28672, 8192, "nf4", rank=16)
compile(2048, 4096, 1024, "nf4")
compile(2048, 3072, 8192, "int4")
compile(300, 576, 1536, "nf4", rank=8)
compile(1500, 1536, 576, "fp4")
compile(3000, 576, 192, "int8", rank=16)
compile(1, 4096, 4096, "nf4")
compile(2048, 4096, 11008, "nf4", dtype=jnp.float32)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_a_tpu(chip: str):
    pytest.importorskip("libtpu")
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, chip],
        env=os.environ | DEVICELESS,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
