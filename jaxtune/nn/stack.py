"""Stacks of equal layers: the one place that chooses scan, unrolling or pipeline, and remat.

A stack is a block whose parameters have a leading axis over its layers. A model holds a list of
stacks: one of all layers when scanned (compile time does not grow with depth, temporaries of one
layer at a time), one per layer when unrolled. `nn.params.suited_policy` chooses; ARCHITECTURE.md
has the numbers.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune.nn.cache import Past
from jaxtune.nn.params import Policy, SharedConstant
from jaxtune.nn.turns import is_rows, scan_some
from jaxtune.sharding import pipeline

# From the fastest to the leanest; "offload" keeps what "dots" keeps, in host memory. All keep an
# adapter's x A: a few numbers for each token, for which x would be read again.
REMAT = ("none", "attention", "dots", "offload", "full")


def stack_sizes(num_layers: int, policy: Policy, kinds: Sequence[Any] = ()) -> tuple[int, ...]:
    """Layers in each stack: of a scanned model its segments, equal chunks, or as few as can be.

    Args:
        num_layers: of the model.
        policy: whether they are scanned, and in how many chunks.
        kinds: of the layers; those that are left over after whole periods are a stack of their own,
            and so are those whose parameters differ in kind (`LayerKind.form`).
    """
    if policy.segments and policy.layers == "scan":
        return policy.segments
    stacks = policy.chunks if policy.layers == "scan" else num_layers
    if stacks > 1 or not kinds:
        return (num_layers // stacks,) * stacks
    sizes = []
    for _, group in itertools.groupby(kinds, lambda kind: kind.form):
        alike = list(group)
        rest = len(alike) % period(alike)
        sizes += [len(alike) - rest, rest] if rest else [len(alike)]
    return tuple(sizes)


def by_stack(values: Any, stacks: Sequence[int]) -> list[Any]:
    """A tree of arrays over all layers [L, ...], cut into one of each stack's layers."""
    ends = itertools.accumulate(stacks)
    return [
        jax.tree.map(lambda leaf, part=slice(end - size, end): leaf[part], values)
        for size, end in zip(stacks, ends, strict=True)
    ]


def period(kinds: Sequence[Any]) -> int:
    """After how many layers their kinds repeat; all of them if they do not, 1 if there are none."""
    lengths = range(1, len(kinds))
    repeats = (n for n in lengths if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return next(repeats, len(kinds) or 1)


def make_stacks(
    makers: Sequence[Callable[[nnx.Rngs], nnx.Module]], sizes: Sequence[int], rngs: nnx.Rngs
) -> nnx.List:
    """Builds a block by each maker, with a leading axis of `sizes[i]` layers."""

    def make_stack(make_block: Callable[[nnx.Rngs], nnx.Module], size: int) -> nnx.Module:
        make = nnx.vmap(make_block, in_axes=0, out_axes=0, axis_size=size)
        return nnx.split_rngs(splits=size)(make)(rngs)

    return nnx.List([make_stack(*one) for one in zip(makers, sizes, strict=True)])


def scan_layers(
    stacks: Sequence[nnx.Module],
    x: jax.Array,
    rows: Any,
    apply: Callable[[Any, Any, jax.Array, Any, Any], tuple[jax.Array, Any]],
    past: Sequence[Past],
    policy: Policy,
    kinds: Sequence[Any],
) -> tuple[jax.Array, list[Any]]:
    """Sends x [B, T, D] through all layers.

    Args:
        stacks: blocks with leading layer axes.
        x: input of the first layer.
        rows: a tree of arrays [B, ...] that go with the rows of x.
        apply: (block, its kind, x, rows, past of the layer) -> (x, what to append to its cache).
        past: of each stack, with leading layer axes; all with a cache, or none.
        policy: says what the backward pass recomputes, and over which stages layers are spread.
        kinds: of all layers, what is static about each; a loop's body has one layer of each until
            they repeat.

    Returns:
        The last layer's output, and of each stack what to append to its cache.
    """
    parts = (nnx.split(blocks, SharedConstant, ...) for blocks in stacks)
    graphdefs, shared, params = zip(*parts, strict=True)
    if any(is_rows(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_rows)):

        def some(x: jax.Array, params: Any, rows: Any) -> jax.Array:
            return apply(nnx.merge(graphdefs[0], shared[0], params), kinds[0], x, rows, Past())[0]

        return scan_some(some, x, params[0], rows), [None]
    given = list(zip(params, past, strict=True))
    if policy.mesh is not None and _is_staged(params, policy.mesh):

        def stage(chunks: Any, turn: jax.Array, x: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
            def layer(kind: Any, x: jax.Array, candidates: Any) -> tuple[jax.Array, Any]:
                params, known = _chosen(candidates, turn)
                return apply(nnx.merge(graphdefs[0], shared[0], params), kind, x, rows, known)

            return _in_turn(layer, x, chunks, policy.remat, kinds[: period(kinds)])

        micro_batches = policy.micro_batches if past[0].cache is None else 1
        return pipeline.run(stage, given, x, rows, mesh=policy.mesh, micro_batches=micro_batches)
    new_caches, first = [], 0
    for graphdef, same, stack in zip(graphdefs, shared, given, strict=True):

        def layer(
            kind: Any,
            x: jax.Array,
            params_and_past: tuple,
            graphdef: Any = graphdef,
            same: Any = same,
        ) -> tuple:
            params, known = params_and_past
            return apply(nnx.merge(graphdef, same, params), kind, x, rows, known)

        here = kinds[first : first + jax.tree.leaves(stack)[0].shape[0]]
        first += len(here)
        x, new = _in_turn(layer, x, stack, policy.remat, here[: period(here)])
        new_caches.append(new)
    return x, new_caches


def _is_staged(params: Sequence[Any], mesh: Mesh) -> bool:
    """Whether stacks are spread over stages; one that they do not divide is whole on each."""
    stages = pipeline.num_stages(mesh)
    return stages > 1 and jax.tree.leaves(params[0])[0].shape[0] % stages == 0


def _chosen(candidates: Sequence[Any], turn: jax.Array) -> Any:
    """The layer of one chunk. On its own, not in the loop: else every tick would keep its copy."""
    if len(candidates) == 1:
        return candidates[0]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(turn, *leaves), *candidates)


def _in_turn(
    layer: Callable, x: jax.Array, given: Any, remat: str, kinds: Sequence[Any]
) -> tuple[jax.Array, Any]:
    """One layer after the other; each takes its part of `given`, which has leading layer axes.

    Args:
        layer: (kind, x, its part of `given`) -> (x, its new cache).
        kinds: of the first layers, until they repeat.
    """
    num_layers, size = jax.tree.leaves(given)[0].shape[0], len(kinds)
    scanned = num_layers > size
    layers = [
        _rematerialized(functools.partial(layer, kind), remat, scanned=scanned) for kind in kinds
    ]
    if scanned and size == 1:
        return jax.lax.scan(layers[0], x, given)

    def group(x: jax.Array, parts: Any) -> tuple[jax.Array, Any]:
        found = []
        for i, one in enumerate(layers):
            x, new = one(x, jax.tree.map(lambda leaf, i=i: leaf[i], parts))
            found.append(new)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    if not scanned:
        return group(x, given)
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), given)
    x, new = jax.lax.scan(group, x, groups)
    return x, jax.tree.map(lambda leaf: leaf.reshape(num_layers, *leaf.shape[2:]), new)


def _rematerialized(layer: Callable, remat: str, *, scanned: bool) -> Callable:
    if remat in ("none", "attention"):
        return layer
    policies = jax.checkpoint_policies
    names = ["linear", "attention"]
    policy = {
        "dots": policies.save_only_these_names(*names, "low_rank"),
        "full": policies.save_only_these_names("low_rank"),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["low_rank"],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)
