import jax
import pytest
from jax.sharding import AxisType

from jaxtune.errors import ConfigError
from jaxtune.sharding.mesh import make_mesh
from jaxtune.sharding.rules import batch_shards


def test_one_axis_takes_what_is_left():
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 1})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert batch_shards(mesh) == 8


def test_chosen_devices():
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 2}, jax.devices()[:2])
    assert mesh.devices.size == 2 and batch_shards(mesh) == 1


@pytest.mark.parametrize("sizes", [{"data": 3, "fsdp": -1}, {"data": 16, "fsdp": -1}, {"data": 4}])
def test_sizes_that_do_not_fit(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(sizes)
