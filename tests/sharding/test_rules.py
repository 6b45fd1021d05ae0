import pytest
from jax.sharding import PartitionSpec

from jaxtune.errors import ConfigError
from jaxtune.sharding.mesh import make_mesh
from jaxtune.sharding.rules import spec


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((32, 64), ("embed", "mlp"), (("fsdp",), ("tensor",))),
        ((3, 32, 64), ("embed", "mlp"), (None, ("fsdp",), ("tensor",))),
        ((3, 32, 4), ("embed", None), (None, ("fsdp",), None)),
        ((8, 16), ("batch", None), (("data", "fsdp"), None)),
        ((3, 8, 32, 64), ("experts", "embed", "mlp"), (None, None, ("fsdp",), ("tensor",))),
        ((3,), (), (None,)),
        ((), (), ()),
    ],
)
def test_trailing_axes_are_named_and_leading_ones_whole(
    shape: tuple[int, ...], axes: tuple, expected: tuple
):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert spec(shape, axes, mesh) == PartitionSpec(*expected)


def test_an_axis_that_cannot_be_divided_stays_whole_and_says_so(caplog: pytest.LogCaptureFixture):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    assert spec((32, 6), ("embed", "kv_heads"), mesh, "k") == PartitionSpec(("fsdp",), None)
    assert "k: axis kv_heads=6 cannot be cut into the shards of mesh.tensor=4" in caplog.text

    with pytest.raises(ConfigError, match=r"k: axis kv_heads=6 .* mesh.indivisible=replicate"):
        spec((32, 6), ("embed", "kv_heads"), mesh, "k", strict=True)


def test_weights_are_cut_along_the_axes_of_tokens_too_and_adapters_along_what_is_left():
    mesh = make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    both = ("fsdp", "sequence")
    assert spec((8, 16), ("batch", "length"), mesh) == PartitionSpec(("fsdp",), ("sequence",))
    assert spec((32, 64), ("embed", "mlp"), mesh) == PartitionSpec(both, ("tensor",))
    assert spec((4, 64), (None, "mlp"), mesh) == PartitionSpec(None, ("tensor", *both))
    # Where the product is too much, what divides.
    assert spec((6, 64), ("embed", "mlp"), mesh) == PartitionSpec(("fsdp",), ("tensor", "sequence"))


def test_mesh_axes_of_one_device_are_left_out():
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    assert spec((32, 64), ("embed", "mlp"), mesh) == PartitionSpec(None, None)


def test_experts_are_shared_out_and_bring_their_own_rows():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    experts = spec((8, 32, 64), ("experts", "embed", "mlp"), mesh)
    assert experts == PartitionSpec(("expert",), ("fsdp",), ("tensor",))
    assert spec((8, 16), ("batch", None), mesh) == PartitionSpec(("fsdp", "expert"), None)
