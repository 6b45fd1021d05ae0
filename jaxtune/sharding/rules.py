"""The one table from logical axes to mesh axes.

A parameter names its trailing axes; leading axes are stacks of layers and stay whole. An axis that
its mesh axes do not divide stays whole too; `spec` logs it if it is told the parameter's name.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.quant import NestedScale, QArray
from jaxtune.quant.qarray import PACK_ROWS
from jaxtune.tree import Skeleton

Axes = tuple[str | None, ...]

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# A layer's weights travel to all shards of these axes before they are used.
GATHERED = ("fsdp",)

_log = logging.getLogger(__name__)


def spec(shape: tuple[int, ...], axes: Axes, mesh: Mesh, name: str = "") -> PartitionSpec:
    """Where the trailing dimensions named `axes` of an array lie on the mesh."""
    parts: list[tuple[str, ...] | None] = [None] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(parts) :], axes, strict=True):
        mesh_axes = tuple(a for a in RULES.get(axis or "", ()) if mesh.shape.get(a, 1) > 1)
        shards = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % shards:
            if name:
                _log.warning(
                    "%s: axis %s=%d is not divisible by %d: replicated", name, axis, size, shards
                )
            mesh_axes = ()
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def specs(value: Any, axes: Axes, mesh: Mesh, name: str = "") -> Any:
    """`spec` of an array, or of each array of a quantized kernel: a tree like `value`.

    The rows of a quantized kernel are cut only between blocks, so that every shard holds whole
    groups with their scales.
    """
    if not isinstance(value, QArray):
        return spec(value.shape, axes, mesh, name)
    *stack, rows, columns = value.shape
    has_groups = value.group_rows < rows
    block = max(PACK_ROWS if value.packed else 1, value.group_rows if has_groups else 1)
    matrix = spec((*stack, rows // block, columns), axes, mesh, name)
    *lead, _, by_column = matrix
    groups = matrix if has_groups else PartitionSpec(*lead, None, by_column)
    whole = PartitionSpec(*lead)
    scale: Any = groups
    if isinstance(value.scale, NestedScale):
        scale = NestedScale(codes=groups, absmax=whole, offset=whole)  # type: ignore[arg-type]
    return dataclasses.replace(
        value,
        codes=matrix,
        scale=scale,
        zero=None if value.zero is None else groups,
        order=None if value.order is None else whole,
    )


def sharding(shape: tuple[int, ...], axes: Axes, mesh: Mesh, name: str = "") -> NamedSharding:
    """`spec` as a sharding of the mesh."""
    return NamedSharding(mesh, spec(shape, axes, mesh, name))


def placed(skeleton: Skeleton, mesh: Mesh) -> dict[str, Any]:
    """Shape, dtype and sharding of every variable of a model, by name."""

    def place(leaf: Any, part: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, part))

    return {
        name: jax.tree.map(place, value, specs(value, skeleton.axes(name), mesh, name))
        for name, value in skeleton.abstract().items()
    }


def fetched(value: jax.Array, axes: Axes, mesh: Mesh | None) -> jax.Array:
    """A weight from host memory, sharded as it is there.

    Without its sharding the partitioner would bring shards together on the host.
    """
    fetch = functools.partial(jax.device_put, device=jax.memory.Space.Device)
    if mesh is None:
        return fetch(value)
    part = spec(value.shape, axes, mesh)
    return jax.shard_map(fetch, mesh=mesh, in_specs=part, out_specs=part)(value)


def gathered(value: Any, axes: Axes, mesh: Mesh | None) -> Any:
    """A weight, as an array or quantized, with its shards of the `GATHERED` axes brought together.

    Called inside a layer: without it the partitioner may move activations instead, and sends
    quantized weights decoded.

    Args:
        value: the weight of one layer.
        axes: logical names of its axes.
        mesh: None: one device.
    """
    if mesh is None or all(mesh.shape.get(a, 1) == 1 for a in GATHERED):
        return value

    def gather(leaf: jax.Array, part: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _without_gathered(part)))

    return jax.tree.map(gather, value, specs(value, axes, mesh))


def gathered_specs(value: Any, axes: Axes, mesh: Mesh) -> Any:
    """Where the arrays of a weight lie after `gathered`."""
    return jax.tree.map(
        _without_gathered,
        specs(value, axes, mesh),
        is_leaf=lambda part: isinstance(part, PartitionSpec),
    )


def _without_gathered(part: PartitionSpec) -> PartitionSpec:
    named = [(axes,) if isinstance(axes, str) else axes or () for axes in part]
    return PartitionSpec(*(tuple(a for a in axes if a not in GATHERED) or None for axes in named))


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are spread."""
    return math.prod(mesh.shape.get(a, 1) for a in RULES["batch"])
