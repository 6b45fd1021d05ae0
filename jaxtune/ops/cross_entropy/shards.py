"""From [B, T] to the tokens of one device: who has which tokens, and which part of the vocabulary.

On a mesh everything is done by hand in one shard_map, because a kernel cannot be partitioned by
the compiler and because the compiler, left alone, gathers an output matrix sharded along D again
for every chunk. Here each device gathers its part of the vocabulary once, [D, V / shards]; what
devices with other parts exchange are a few numbers per token and, in the end, the sum of dx.
"""

import functools
import importlib
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.ops.cross_entropy.form import Form, Parts


def run(
    module: str,
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    form: Form,
    shardings: tuple[NamedSharding, NamedSharding] | None,
    *,
    of_x: bool = False,
    of_w: bool = False,
) -> Parts:
    """Parts of all tokens: losses and correct [B, T], dx like x, dw like w in w's dtype.

    Args:
        module: path of the implementation.
        x: [B, T, D].
        w: [D, V] or [V, D].
        targets, weights: [B, T].
        form: what the loss is.
        shardings: how x and w lie on a mesh; None: no mesh.
        of_x, of_w: which gradients of the weighted sum of losses are wanted.

    Raises:
        ValueError: a mesh axis shards the vocabulary and something else, or x along D.
    """
    shard = functools.partial(_shard, module=module, of_x=of_x, of_w=of_w)
    if shardings is None:
        return Parts(*shard(x, w, targets, weights, form=form, tokens_over=(), embed_over=()))
    of_tokens, of_weight = (
        _axes_by_dimension(s, n) for s, n in zip(shardings, (3, 2), strict=True)
    )
    tokens_over = of_tokens[0] + of_tokens[1]
    vocab_over, embed_over = of_weight if form.transposed else of_weight[::-1]
    if of_tokens[2] or set(vocab_over) & set(tokens_over + embed_over):
        raise ValueError(f"cross_entropy cannot work on x {shardings[0]} and w {shardings[1]}")
    rows, x_spec, w_spec = (PartitionSpec(*s) for s in (of_tokens[:2], of_tokens, of_weight))
    form = replace(form, axes=vocab_over)
    parts = jax.shard_map(
        functools.partial(shard, form=form, tokens_over=tokens_over, embed_over=embed_over),
        mesh=shardings[0].mesh,
        in_specs=(x_spec, w_spec, rows, rows),
        out_specs=(rows, rows, x_spec if of_x else None, w_spec if of_w else None),
        check_vma=False,
    )(x, w, targets, weights)
    return Parts(*parts)


def _shard(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    module: str,
    form: Form,
    tokens_over: tuple[str, ...],
    embed_over: tuple[str, ...],
    of_x: bool,
    of_w: bool,
) -> tuple:
    """`run` of one device: x [b, t, D], w [V / shards, D / shards] or turned."""
    vocab_dim, embed_dim = (0, 1) if form.transposed else (1, 0)
    whole = w.astype(x.dtype)
    if embed_over:
        whole = jax.lax.all_gather(whole, embed_over, axis=embed_dim, tiled=True)
    vocab = whole.shape[vocab_dim]
    tokens, labels, factors = x.reshape(-1, x.shape[-1]), jnp.ravel(targets), jnp.ravel(weights)
    # Tokens without weight last; the others by target, which kernels make use of.
    order = jnp.argsort(jnp.where(factors != 0, labels, form.vocab))
    count = (factors != 0).sum(dtype=jnp.int32)
    if tokens_over:  # equally many chunks everywhere: they contain collectives
        count = jax.lax.pmax(count, tokens_over)
    local = labels - jax.lax.axis_index(form.axes) * vocab if form.axes else labels
    local = jnp.where((local >= 0) & (local < vocab) & (factors != 0), local, -1)
    implementation = importlib.import_module(module).run
    rows = (tokens[order], whole, local[order], factors[order])
    # What is still to be summed over devices is float32.
    dw_dtype = jnp.dtype(jnp.float32 if tokens_over else w.dtype) if of_w else None
    losses, correct, dx, dw = implementation(*rows, count, form, of_x=of_x, dw_dtype=dw_dtype)
    back = jnp.argsort(order)
    losses, correct = (rows[back].reshape(targets.shape) for rows in (losses, correct))
    if dx is not None:
        dx = dx[back].reshape(x.shape)
        dx = jax.lax.psum(dx, form.axes) if form.axes else dx
    if dw is not None:
        dw = _reduced(dw, tokens_over, embed_over, embed_dim).astype(w.dtype)
    return losses, correct, dx, dw


def _reduced(
    dw: jax.Array, tokens_over: tuple[str, ...], embed_over: tuple[str, ...], embed_dim: int
) -> jax.Array:
    """Sum over the tokens of all devices; each keeps its part along D."""
    if embed_over:
        dw = jax.lax.psum_scatter(dw, embed_over, scatter_dimension=embed_dim, tiled=True)
    others = tuple(axis for axis in tokens_over if axis not in embed_over)
    dw = jax.lax.psum(dw, others) if others else dw
    # Devices along these axes have the same tokens, each of which the sum counts several times.
    return dw / math.prod(jax.lax.axis_size(axis) for axis in embed_over if axis not in tokens_over)


def _axes_by_dimension(sharding: NamedSharding, ndim: int) -> tuple[tuple[str, ...], ...]:
    parts = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    return tuple((p,) if isinstance(p, str) else tuple(p or ()) for p in parts)
