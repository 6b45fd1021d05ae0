"""The one table from logical axes to mesh axes.

A parameter names its trailing axes; the axis before those is a stack's, over its layers. An axis
that a mesh axis does not divide is not cut along it; `spec` says so if it is told the parameter's
name.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import ConfigError
from jaxtune.quant import NestedScale, QArray
from jaxtune.quant.qarray import PACK_ROWS
from jaxtune.sharding.mesh import current, on_shards
from jaxtune.tree import Skeleton

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# A layer's weights travel to all shards of these axes before they are used.
GATHERED = ("fsdp", "sequence")

RULES: Rules = {
    # Of activations: rows in the layers, rows before and after, tokens in attention and MLP,
    # tokens between them, key heads.
    "batch": ("data", "fsdp", "expert"),
    "row": ("data", "fsdp", "expert", "stage"),
    "length": ("sequence",),
    "residual_length": ("sequence", "tensor"),
    "key_heads": ("tensor",),
    # Of parameters.
    "layers": ("stage",),
    "experts": ("expert",),
    "embed": GATHERED,
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Axes of activations [B, T, D]: inside a layer and between them; the same before and after all.
TOKENS: Axes = ("batch", "length", None)
RESIDUAL: Axes = ("batch", "residual_length", None)
OUTER_TOKENS: Axes = ("row", "length", None)
OUTER_RESIDUAL: Axes = ("row", "residual_length", None)

# Where no other axis of a parameter takes them: adapters have matrices without "embed".
SPARE: Rules = dict.fromkeys(("heads", "kv_heads", "mlp"), GATHERED)

_log = logging.getLogger(__name__)


def spec(
    shape: tuple[int, ...], axes: Axes, mesh: Mesh, name: str = "", *, strict: bool = False
) -> PartitionSpec:
    """Where an array lies on the mesh.

    Args:
        shape: of the array.
        axes: logical names of its dimensions, without that of a stack of layers.
        mesh: the devices.
        name: of a parameter; a mesh axis that does not divide it is logged.
        strict: raise instead.

    Raises:
        ConfigError: a mesh axis does not divide an axis, and that is an error.
    """
    axes = ("layers", *axes) if len(shape) > len(axes) else axes
    parts: list[tuple[str, ...]] = [()] * len(axes)
    for rules in (RULES, SPARE):
        for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            for mesh_axis in rules.get(axis or "", ()):
                count = mesh.shape.get(mesh_axis, 1)
                if count == 1 or any(mesh_axis in part for part in parts):
                    continue
                if size % (count * math.prod(mesh.shape[a] for a in parts[i])) == 0:
                    parts[i] += (mesh_axis,)
                elif name and rules is RULES:
                    _not_cut(f"{name}: axis {axis}={size}", f"mesh.{mesh_axis}={count}", strict)
    return PartitionSpec(*(part or None for part in parts))


def _not_cut(what: str, by: str, strict: bool) -> None:
    if strict:
        raise ConfigError(
            f"{what} cannot be cut into the shards of config.{by} - change the mesh, or set "
            "mesh.indivisible=replicate"
        )
    _log.warning("%s cannot be cut into the shards of %s: it stays whole", what, by)


def specs(value: Any, axes: Axes, mesh: Mesh, name: str = "", *, strict: bool = False) -> Any:
    """`spec` of an array, or of each array of a quantized kernel: a tree like `value`.

    The rows of a quantized kernel are cut only between blocks, so that every shard holds whole
    groups with their scales.
    """
    if not isinstance(value, QArray):
        return spec(value.shape, axes, mesh, name, strict=strict)
    *stack, rows, columns = value.shape
    has_groups = value.group_rows < rows
    block = max(PACK_ROWS if value.packed else 1, value.group_rows if has_groups else 1)
    matrix = spec((*stack, rows // block, columns), axes, mesh, name, strict=strict)
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


def constrained(x: jax.Array, axes: Axes, mesh: Mesh | None) -> jax.Array:
    """An activation, told where it lies; None: one device."""
    if mesh is None or mesh.size == 1:
        return x
    return _placed(x, spec(x.shape, axes, mesh), mesh)


def _placed(x: jax.Array, part: PartitionSpec, mesh: Mesh) -> jax.Array:
    where = NamedSharding(current(mesh), part)  # pyright: ignore[reportArgumentType]
    return jax.lax.with_sharding_constraint(x, where)


def moved(x: jax.Array, before: Axes, after: Axes, mesh: Mesh | None) -> jax.Array:
    """An activation brought to another sharding, and its cotangent back to the first.

    `constrained` would leave the cotangent where the result is: sums over shards that the backward
    pass could scatter would be made whole first.
    """

    if mesh is None or mesh.size == 1:
        return x
    return _constrained(x, spec(x.shape, after, mesh), [spec(x.shape, before, mesh)], mesh)


def placed(
    skeleton: Skeleton, mesh: Mesh, *, sharding_stage: int = 3, strict: bool = False
) -> dict[str, Any]:
    """Shape, dtype and sharding of every variable of a model, by name.

    Args:
        skeleton: the model.
        mesh: the devices.
        sharding_stage: below 3, parameters are whole along the `GATHERED` axes.
        strict: see `spec`.

    Raises:
        ConfigError: see `spec`.
    """

    def place(leaf: Any, part: PartitionSpec) -> jax.ShapeDtypeStruct:
        part = part if sharding_stage == 3 else _without_gathered(part)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, part))

    return {
        name: jax.tree.map(
            place, value, specs(value, skeleton.axes(name), mesh, name, strict=strict)
        )
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
    return on_shards(fetch, mesh, part, part)(value)


def gathered(
    value: Any, axes: Axes, mesh: Mesh | None, *, scatter: bool = True, is_small: bool = False
) -> Any:
    """A weight, as an array or quantized, with its shards of the `GATHERED` axes brought together.

    Called inside a layer: without it the partitioner may move activations instead, and sends
    quantized weights decoded.

    Args:
        value: the weight of one layer.
        axes: logical names of its axes.
        mesh: None: one device.
        scatter: whether its gradient is cut into the shards again; else it stays whole.
        is_small: whether its gradient is summed before it is cut. The partitioner would rather
            compute and pass on one shard after the other in a loop: faster for a large weight only.
    """
    if mesh is None or all(mesh.shape.get(a, 1) == 1 for a in GATHERED):
        return value

    def gather(leaf: jax.Array, part: PartitionSpec) -> jax.Array:
        whole = _without_gathered(part)
        last = part if scatter else whole
        return _constrained(leaf, whole, [whole, last] if is_small else [last], mesh)

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


def _constrained(
    x: jax.Array, to: PartitionSpec, back: Sequence[PartitionSpec], mesh: Mesh
) -> jax.Array:
    """x where `to` says, its cotangent where `back` says, one place after the other."""

    @jax.custom_vjp
    def move(x: jax.Array) -> jax.Array:
        return _placed(x, to, mesh)

    def move_back(_: None, g: jax.Array) -> tuple[jax.Array]:
        for part in back:
            g = _placed(g, part, mesh)
        return (g,)

    move.defvjp(lambda x: (_placed(x, to, mesh), None), move_back)
    return move(x) if jnp.issubdtype(x.dtype, jnp.inexact) else _placed(x, to, mesh)


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are spread."""
    return math.prod(mesh.shape.get(a, 1) for a in RULES["batch"])
