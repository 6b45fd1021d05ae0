"""The one table from logical axes to mesh axes.

A parameter names its trailing axes; leading axes are stacks of layers and stay whole. An axis that
its mesh axes do not divide stays whole too; `spec` says so to its caller's log.
"""

import logging
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.tree import Skeleton

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

_log = logging.getLogger(__name__)


def spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, name: str = ""
) -> PartitionSpec:
    """Where the trailing dimensions named `axes` of an array lie on the mesh."""
    parts: list[tuple[str, ...] | None] = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(parts) :], axes, strict=True):
        mesh_axes = tuple(a for a in RULES.get(axis or "", ()) if mesh.shape.get(a, 1) > 1)
        shards = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % shards:
            _log.warning(
                "%s: axis %s=%d is not divisible by %d: replicated", name, axis, size, shards
            )
            mesh_axes = ()
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def sharding(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, name: str = ""
) -> NamedSharding:
    """`spec` as a sharding of the mesh."""
    return NamedSharding(mesh, spec(shape, axes, mesh, name))


def placed(skeleton: Skeleton, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every variable of a model, by name."""
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=sharding(leaf.shape, skeleton.axes(name), mesh, name),
        )
        for name, leaf in skeleton.abstract().items()
    }


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are spread."""
    return math.prod(mesh.shape.get(a, 1) for a in RULES["batch"])
