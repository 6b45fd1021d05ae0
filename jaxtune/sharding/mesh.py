"""The device mesh, whose axes are those of `schema.Mesh`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxtune.errors import ConfigError

HOST = "pinned_host"  # the memory kind of a device that is its host's memory


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices in the given axes, one of which may be -1 (all that are left).

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(n for n in sizes.values() if n != -1)
    resolved = {name: len(devices) // fixed if n == -1 else n for name, n in sizes.items()}
    if math.prod(resolved.values()) != len(devices):
        asked = " x ".join(f"{name}={n}" for name, n in sizes.items())
        raise ConfigError(
            f"config.mesh: {asked} does not fit {len(devices)} devices - "
            "the product must equal their number; set one axis to -1"
        )
    axis_types = (AxisType.Auto,) * len(resolved)
    arranged = _arranged(devices, tuple(resolved.values()))
    return Mesh(arranged, tuple(resolved), axis_types=axis_types)


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices so that neighbours along an axis are neighbours in the torus of a TPU slice.

    Several slices, and everything else, stay in JAX's order.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform != "tpu" or len(devices) < 4 or len(slices) > 1:
        return np.array(devices).reshape(shape)
    return create_device_mesh(shape, devices, allow_split_physical_axes=True)


def current(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh to name here: inside a `shard_map` over some of its axes, the one that says so."""
    here = jax.sharding.get_abstract_mesh()
    return mesh if here.empty else here


def on_shards(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over all axes of the mesh that a surrounding one has left."""
    here = current(mesh)
    return jax.shard_map(
        function,
        mesh=here,
        axis_names=set(here.auto_axes),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def has_host_memory(device: Any) -> bool:
    """Whether arrays of a device can be kept in its host's memory.

    Of a GPU that is only described XLA does not say which memory an array is in.
    """
    return HOST in {memory.kind for memory in device.addressable_memories()}


def own_device(mesh: Mesh) -> Any:
    """A device of the mesh that this process can ask about itself; of described ones, the first."""
    own = (d for d in mesh.devices.flat if d.process_index == jax.process_index())
    return next(own, mesh.devices.flat[0])


def require_host_memory(mesh: Mesh, option: str) -> None:
    """Raises ConfigError if the devices cannot keep arrays in their host's memory."""
    device = own_device(mesh)
    if not has_host_memory(device):
        raise ConfigError(
            f"config.{option} needs devices with host memory ({HOST}), which this "
            f"{device.device_kind} does not show - turn it off"
        )
