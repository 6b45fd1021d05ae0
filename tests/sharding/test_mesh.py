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


def test_neighbours_in_a_tpu_slice_are_neighbours_in_the_mesh():
    """A row of eight chips comes as two squares of four, which is how hosts hold them."""

    class Chip:
        platform, device_kind, process_index, slice_index = "tpu", "TPU v5 lite", 0, 0
        core_on_chip = 0

        def __init__(self, x: int, y: int):
            self.id, self.coords = 2 * x + y, (x, y, 0)

    chips = [Chip(x, y) for x in range(4) for y in range(2)]
    hosts = [c for c in chips if c.coords[0] < 2] + [c for c in chips if c.coords[0] >= 2]
    mesh = make_mesh({"fsdp": 2, "tensor": 4}, hosts)
    for row in mesh.devices:
        for chip, other in zip(row, row[1:], strict=False):
            assert sum(abs(a - b) for a, b in zip(chip.coords, other.coords, strict=True)) == 1
    twice = hosts[:4] + [type("Other", (Chip,), {"slice_index": 1})(x, 5) for x in range(4)]
    assert list(make_mesh({"fsdp": 8}, twice).devices) == twice


@pytest.mark.parametrize("sizes", [{"data": 3, "fsdp": -1}, {"data": 16, "fsdp": -1}, {"data": 4}])
def test_sizes_that_do_not_fit(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(sizes)
