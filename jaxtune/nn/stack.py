"""Stacks of equal layers: the one place that chooses between scan and unrolling, and remat.

A stack is a block whose parameters have a leading axis over its layers. A model holds a list of
stacks: one of all layers when scanned (compile time does not grow with depth, temporaries of one
layer at a time), one per layer when unrolled. `nn.params.suited_policy` chooses; ARCHITECTURE.md
has the numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

# From the fastest to the leanest; "offload" keeps what "dots" keeps, in host memory.
REMAT = ("none", "attention", "dots", "offload", "full")


def stack_sizes(num_layers: int, layers: str) -> tuple[int, ...]:
    """Layers in each stack for the layout "scan" or "unroll"."""
    return (num_layers,) if layers == "scan" else (1,) * num_layers


def make_stacks(
    make_block: Callable[[nnx.Rngs], nnx.Module], sizes: Sequence[int], rngs: nnx.Rngs
) -> nnx.List:
    """Builds blocks with a leading axis of `sizes[i]` layers each."""

    def make_stack(size: int) -> nnx.Module:
        make = nnx.vmap(make_block, in_axes=0, out_axes=0, axis_size=size)
        return nnx.split_rngs(splits=size)(make)(rngs)

    return nnx.List([make_stack(size) for size in sizes])


def scan_layers(
    stacks: Sequence[nnx.Module],
    x: jax.Array,
    apply: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    caches: Sequence[Any] | None,
    *,
    remat: str,
) -> tuple[jax.Array, list[Any]]:
    """Sends x [B, T, D] through all layers.

    Args:
        stacks: blocks with leading layer axes.
        x: input of the first layer.
        apply: (block, x, cache of the layer) -> (x, new cache of the layer).
        caches: per stack, a tree with leading layer axes; None without a cache.
        remat: what the backward pass recomputes, one of `REMAT`.

    Returns:
        The last layer's output, and the new caches of each stack.
    """
    caches = [None] * len(stacks) if caches is None else caches
    new_caches = []
    for blocks, cache in zip(stacks, caches, strict=True):
        graphdef, params = nnx.split(blocks)

        def layer(x: jax.Array, params_and_cache: tuple, graphdef: Any = graphdef) -> tuple:
            params, cache = params_and_cache
            return apply(nnx.merge(graphdef, params), x, cache)

        num_layers = jax.tree.leaves(params)[0].shape[0]
        layer = _rematerialized(layer, remat, scanned=num_layers > 1)
        if num_layers == 1:
            x, new = layer(x, jax.tree.map(lambda leaf: leaf[0], (params, cache)))
            new = jax.tree.map(lambda leaf: leaf[None], new)
        else:
            x, new = jax.lax.scan(layer, x, (params, cache))
        new_caches.append(new)
    return x, new_caches


def _rematerialized(layer: Callable, remat: str, *, scanned: bool) -> Callable:
    if remat in ("none", "attention"):
        return layer
    policies = jax.checkpoint_policies
    names = ["linear", "attention"]
    policy = {
        "dots": policies.save_only_these_names(*names),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)
