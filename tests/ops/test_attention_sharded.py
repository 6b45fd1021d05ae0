"""Attention over rows that are cut along the tokens, against the reference on whole rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxtune.ops.attention import Mask, ring, ulysses, xla
from jaxtune.ops.attention.flash import Operands
from jaxtune.sharding.mesh import make_mesh
from tests import tolerances
from tests.ops import attention_cases

ROW = PartitionSpec(None, "sequence")
UNSUPPORTED = {"prefix", "offset", "traced_offset", "lengths"}


def cut(operands: Operands, shards: int) -> Operands:
    """The same case with rows of a length that the shards divide."""
    length = operands.q.shape[1] // shards * shards

    def shorter(x: jax.Array) -> jax.Array:
        return x[:, :length]

    mask = jax.tree.map(shorter, operands.mask)
    q, k, v = (shorter(x) for x in (operands.q, operands.k, operands.v))
    return dataclasses.replace(operands, q=q, k=k, v=v, mask=mask)


def ring_of(mesh: Mesh) -> attention_cases.Attend:
    def attend(operands: Operands) -> tuple[jax.Array, jax.Array]:
        def one(q: Any, k: Any, v: Any, mask: Mask, sinks: Any) -> tuple[jax.Array, jax.Array]:
            mine = dataclasses.replace(operands, q=q, k=k, v=v, mask=mask, sinks=sinks)
            return ring.attend(mine, "sequence", "xla")

        rows = jax.tree.map(lambda _: ROW, operands.mask)
        sinks = None if operands.sinks is None else PartitionSpec()
        mapped = jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(ROW, ROW, ROW, rows, sinks),
            out_specs=(ROW, ROW),
            check_vma=False,
        )
        return mapped(operands.q, operands.k, operands.v, operands.mask, operands.sinks)

    return attend


def check_ring(first: int, count: int, shards: int, dtype: Any, tolerance: float) -> None:
    mesh = make_mesh({"sequence": shards}, jax.devices()[:shards])
    for case in attention_cases.cases(count, first=first, dtype=dtype, without=UNSUPPORTED):
        operands = cut(case.operands, shards)
        length = operands.q.shape[1]
        if length == 0:
            continue
        case = dataclasses.replace(
            case, operands=operands, dy=case.dy[:, :length], dlse=case.dlse[:, :length]
        )
        attention_cases.check(ring_of(mesh), case, tolerance)


def test_a_ring_of_four_is_the_reference():
    check_ring(3, 5, 4, jnp.float32, tolerances.OPS)


def test_a_ring_in_bfloat16():
    check_ring(50, 2, 2, jnp.bfloat16, tolerances.OPS_BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 8])
def test_rings_in_many_cases(shards: int):
    check_ring(100 * shards, 30, shards, jnp.float32, tolerances.OPS)


def test_a_ring_refuses_what_it_cannot_do():
    case = next(iter(attention_cases.cases(1, without=UNSUPPORTED)))
    operands = dataclasses.replace(case.operands, query_offset=3)
    with pytest.raises(NotImplementedError, match="query_offset"):
        ring.attend(operands, "sequence", "xla")
    with pytest.raises(NotImplementedError, match="splash"):
        ring.attend(case.operands, "sequence", "splash")


@pytest.mark.parametrize("seed", [1, 2])
def test_exchanged_heads_are_the_reference(seed: int):
    """Softcap, sinks and ALiBi are parts of the attention that is called, not of the exchange."""
    without = UNSUPPORTED | {"softcap", "sinks", "alibi"}
    mesh = make_mesh({"sequence": 2}, jax.devices()[:2])
    cases = attention_cases.cases(60, first=seed, without=without)
    case = next(c for c in cases if c.operands.k.shape[2] % 2 == 0 and c.features)
    operands = cut(case.operands, 2)
    length = operands.q.shape[1]

    def attend(operands: Operands) -> tuple[jax.Array, None]:
        def attention(q: Any, k: Any, v: Any, mask: Mask) -> jax.Array:
            whole = dataclasses.replace(operands, q=q, k=k, v=v, mask=mask)
            return xla.attend(whole)[0]

        mapped = jax.shard_map(
            functools.partial(ulysses.attend, axis="sequence", attention=attention),
            mesh=mesh,
            in_specs=(ROW, ROW, ROW, jax.tree.map(lambda _: ROW, operands.mask)),
            out_specs=ROW,
            check_vma=False,
        )
        return mapped(operands.q, operands.k, operands.v, operands.mask), None

    assert length > 0
    case = dataclasses.replace(
        case, operands=operands, dy=case.dy[:, :length], dlse=case.dlse[:, :length]
    )
    attention_cases.check(attend, case, tolerances.OPS)
