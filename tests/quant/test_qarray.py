"""Quantized kernels as pytrees: packed, cut over devices, saved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import quant
from tests.quant.oracle import as_kernel, random_weight

CHOICES = [("int8", False), ("int8_block", False), ("int4", False), ("nf4", True), ("fp4", False)]


def quantized(format: str, double_quant: bool, rows: int = 512) -> quant.QArray:
    kernel = as_kernel(random_weight(rows, 80))
    return jax.jit(lambda k: quant.quantize(k, format, double_quant=double_quant))(kernel)


def test_packing():
    codes = np.random.default_rng(0).integers(0, 16, (3, 192, 5), np.uint8)
    packed = np.asarray(quant.pack(jnp.asarray(codes)))
    assert packed.shape == (3, 96, 5)
    np.testing.assert_array_equal(packed[:, 32 + 7], codes[:, 64 + 7] | codes[:, 64 + 39] << 4)
    np.testing.assert_array_equal(quant.unpack(jnp.asarray(packed)), codes)
    np.testing.assert_array_equal(quant.unpack(packed), codes)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("format, double_quant", CHOICES)
def test_cut_over_devices(format, double_quant, axis):
    q = quantized(format, double_quant)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spec = PartitionSpec(*(("x", None) if axis == 0 else (None, "x")))

    def cut(array: jax.Array) -> NamedSharding:
        divides = array.ndim == 2 and array.shape[axis] % len(jax.devices()) == 0
        return NamedSharding(mesh, spec if divides else PartitionSpec())

    placed = jax.tree.map(lambda array: jax.device_put(array, cut(array)), q)
    assert not placed.codes.sharding.is_fully_replicated
    dequantize = jax.jit(lambda q: quant.dequantize(q, jnp.float32))
    compiled = dequantize.lower(placed).compile()
    whole = dequantize(q)
    dense = compiled(placed)
    np.testing.assert_array_equal(dense, whole)
    assert dense.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    # No device sees more of the codes than its own.
    assert f"u8[{q.codes.shape[0]},{q.codes.shape[1]}]" not in str(compiled.as_text())


@pytest.mark.parametrize("format, double_quant", CHOICES)
def test_saved_as_packed_bytes(tmp_path, format, double_quant):
    q = quantized(format, double_quant, rows=128)
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "state", args=ocp.args.StandardSave({"kernel": q}))
        checkpointer.wait_until_finished()
        target = {"kernel": jax.tree.map(ocp.utils.to_shape_dtype_struct, q)}
        restored = checkpointer.restore(tmp_path / "state", args=ocp.args.StandardRestore(target))[
            "kernel"
        ]
    assert isinstance(restored, quant.QArray) and restored.format == q.format
    assert jax.tree.structure(restored) == jax.tree.structure(q)
    for saved, back in zip(jax.tree.leaves(q), jax.tree.leaves(restored), strict=True):
        assert saved.dtype == back.dtype
        assert np.asarray(saved).tobytes() == np.asarray(back).tobytes()


def test_bytes_of_a_parameter():
    shape = (4096, 14336)
    kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for format, double_quant, limit in (
        ("nf4", True, 0.516), ("nf4", False, 0.563), ("int8", False, 1.001),
    ):  # fmt: skip
        q = jax.eval_shape(
            lambda k, f=format, d=double_quant: quant.quantize(k, f, double_quant=d), kernel
        )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))
        assert size / math.prod(shape) <= limit


@pytest.mark.parametrize("options", [{"format": "int8"}, {"format": "nf4", "double_quant": True}])
def test_columns_of_a_kernel(options: dict):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(128, 12)), jnp.float32)
    q = quant.quantize(kernel, **options)
    columns = np.array([7, 2, 11, 0])
    part = quant.take_columns(q, columns)
    expected = quant.dequantize(q, jnp.float32)[:, columns]
    np.testing.assert_array_equal(quant.dequantize(part, jnp.float32), expected)
    assert quant.take_columns(q, None) is q
