"""Attention over rows whose tokens are spread over devices: keys travel around the ring of them.

Each device keeps its queries and sees the keys and values of all devices in turn (ring attention,
arXiv 2310.01889); what it has so far and what a shard of keys gives are merged by their
log-sum-exps. In the backward pass the gradients of the keys travel with them, until both are home.
Both passes are those of an implementation of our own, which skips shards that the mask empties.

To be called where the mesh axis is manual, inside `shard_map`.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.ops.attention import flash
from jaxtune.ops.attention.flash import Operands, Passes
from jaxtune.ops.attention.mask import Columns

# Implementations with the two passes that `flash` names.
IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


def attend(operands: Operands, axis: str, implementation: str) -> tuple[jax.Array, jax.Array]:
    """Output [B, t, N, H] and log-sum-exp [B, t, N] of the t queries of this device.

    Args:
        operands: with the queries and as many keys of this device's part of the row; the
            mask's columns count positions of the whole row.
        axis: the mesh axis along which the row is cut.
        implementation: of `IMPLEMENTATIONS`.

    Raises:
        NotImplementedError: prefix keys, a bias by distance, an offset of the queries, or no such
            implementation.
    """
    flash.refuse("ring", operands, "prefix", "relative", "query_offset", "lengths")
    if implementation not in IMPLEMENTATIONS:
        raise NotImplementedError(f"ring attention cannot use {implementation} attention")
    module = importlib.import_module(f"jaxtune.ops.attention.{implementation}")
    inner = Passes(module.forward, module.backward)
    passes = Passes(
        functools.partial(_forward, inner, axis), functools.partial(_backward, inner, axis)
    )
    return flash.attend(passes, operands)


def _forward(inner: Passes, axis: str, operands: Operands) -> tuple[jax.Array, jax.Array]:
    y, lse = inner.forward(_met(operands, _keys_of(operands), axis, 0))
    size = lax.axis_size(axis)

    def step(i: jax.Array, carry: tuple) -> tuple:
        y, lse, keys = carry
        keys = _passed_on(keys, axis)
        found, found_lse = inner.forward(_met(operands, keys, axis, i))
        both = jnp.logaddexp(lse, found_lse)
        y = _share(lse, both) * y + _share(found_lse, both) * found.astype(jnp.float32)
        return y, both, keys

    start = (y.astype(jnp.float32), lse, _keys_of(operands))
    y, lse, _ = lax.fori_loop(1, size, step, start)
    return y.astype(operands.q.dtype), lse


def _backward(
    inner: Passes,
    axis: str,
    operands: Operands,
    lse: jax.Array,
    dy: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def step(i: jax.Array, carry: tuple) -> tuple:
        gradients, keys = carry
        dq, *of_keys = gradients
        *of_keys, keys = _passed_on((*of_keys, keys), axis)
        found = inner.backward(_met(operands, keys, axis, i), lse, dy, delta)
        return _sums((dq, *of_keys), found), keys

    own = inner.backward(_met(operands, _keys_of(operands), axis, 0), lse, dy, delta)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in own)
    start = (_sums(zeros, own), _keys_of(operands))
    (dq, dk, dv), _ = lax.fori_loop(1, lax.axis_size(axis), step, start)
    dk, dv = _passed_on((dk, dv), axis)
    like = (operands.q, operands.k, operands.v)
    dq, dk, dv = (x.astype(y.dtype) for x, y in zip((dq, dk, dv), like, strict=True))
    return dq, dk, dv


def _keys_of(operands: Operands) -> tuple:
    """What travels: keys, values, and what the mask knows of them."""
    mask = operands.mask
    columns = mask.columns
    if columns is not None and columns.ute is not None and columns.uts is None:
        columns = dataclasses.replace(columns, uts=jnp.zeros_like(columns.ute))
    return operands.k, operands.v, mask.key_segments, columns


def _met(operands: Operands, keys: tuple, axis: str, i: Any) -> Operands:
    """This device's queries and the keys that arrive after i steps; sinks count once, at home."""
    size, here, length = lax.axis_size(axis), lax.axis_index(axis), operands.q.shape[1]
    home = jnp.mod(here - i, size)
    k, v, segments, columns = keys
    if columns is not None:
        columns = Columns(
            *(
                None if x is None else x - home * length
                for x in (columns.lts, columns.lte, columns.uts, columns.ute)
            )
        )
    at_home = isinstance(i, int) and i == 0
    return dataclasses.replace(
        operands,
        k=k,
        v=v,
        mask=dataclasses.replace(operands.mask, key_segments=segments, columns=columns),
        sinks=operands.sinks if at_home else None,
        query_offset=0 if at_home else (here - home) * length,
    )


def _passed_on(values: Any, axis: str) -> Any:
    """What the device before this one has."""
    size = lax.axis_size(axis)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), values)


def _share(lse: jax.Array, both: jax.Array) -> jax.Array:
    return jnp.exp(lse - both)[..., None]


def _sums(sums: tuple, found: tuple) -> tuple:
    return tuple(a + b.astype(a.dtype) for a, b in zip(sums, found, strict=True))
