"""Shifted sparse attention against a literal transcription, head by head and token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import build, ops
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenBatch
from jaxtune.errors import ConfigError
from jaxtune.fit import training_objective
from jaxtune.nn.attention import Attention, AttentionConfig, Segments, shifted_groups
from jaxtune.nn.params import Policy
from jaxtune.nn.rope import Rope, rope_table
from jaxtune.schema import Data, Model, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from tests import oracle, tolerances

WIDTH, HEADS, SIZE = 16, 4, 8


def examples(length: int) -> np.ndarray:
    """Positions [2, T]: one example, and a packed row with padding."""
    packed = np.concatenate([np.arange(length // 2), np.arange(length // 3)])
    return np.stack([np.arange(length), np.pad(packed, (0, length - len(packed)))])


def allowed(positions: np.ndarray, group: int) -> np.ndarray:
    """bool [2 halves, T, T]: LongLoRA's flash code, which cuts rows of one example, for each."""
    found = np.zeros((2, len(positions), len(positions)), bool)
    starts = [*np.flatnonzero(positions == 0), len(positions)]
    for start, end in zip(starts, starts[1:], strict=False):
        whole = [*range(0, end - start, group), end - start]
        shifted = [0, *range(group // 2, end - start, group), end - start]
        for half, borders in enumerate((whole, shifted)):
            for a, b in zip(borders, borders[1:], strict=False):
                found[half, start + a : start + b, start + a : start + b] = True
    return found & np.tri(len(positions), dtype=bool)


def dense(layer: Attention, x: jax.Array, rope: tuple, sees: np.ndarray) -> jax.Array:
    """The layer with every score made; sees [B, N, T, T]."""
    b, t, _ = x.shape
    q, k, v = (
        project(x).reshape(b, t, -1, SIZE) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
    k, v = (jnp.repeat(y, HEADS // y.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * SIZE**-0.5
    weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return layer.o_proj(y.reshape(b, t, -1))


@pytest.mark.parametrize("num_kv_heads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_shifted_groups_are_those_of_longlora(num_kv_heads: int) -> None:
    config = AttentionConfig(
        hidden_size=WIDTH,
        num_heads=HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=SIZE,
        norm_eps=1e-5,
    )
    layer = Attention(config, policy=Policy(), rngs=nnx.Rngs(0))
    for project in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        project.kernel.set_value(project.kernel.get_value() * 20)
    positions, group = examples(26), 8
    x = jax.random.normal(jax.random.key(1), (*positions.shape, WIDTH))
    rope = rope_table(jnp.asarray(positions), Rope(head_dim=SIZE, theta=100.0))
    sees = np.repeat(np.stack([allowed(row, group) for row in positions]), HEADS // 2, axis=1)
    weight = np.random.default_rng(0).normal(size=x.shape)

    def shifted(x: jax.Array) -> jax.Array:
        return layer(x, rope, shifted_groups(jnp.asarray(positions), group))[0]

    def expected(x: jax.Array) -> jax.Array:
        return dense(layer, x, rope, sees)

    @jax.jit
    def results(x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        found = []
        for call in (shifted, expected):
            y, pull = jax.vjp(call, x)
            found.append((y, pull(weight.astype(y.dtype))[0]))
        return found

    (y, dx), (right_y, right_dx) = results(x)
    assert oracle.difference(y, right_y) <= tolerances.OPS_LONG_SUMS
    assert oracle.difference(dx, right_dx) <= tolerances.GRADIENTS
    assert oracle.difference(y, layer(x, rope, Segments(None, None))[0]) > 0.01


def described(group: int) -> build.Run:
    config = RunConfig(
        model=Model(path="tiny:llama"),
        data=Data(train=("rows.jsonl",), max_seq_len=24),
        train=Train(attention_group=group),
    )
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    return build.describe(config, mesh, open_checkpoint("tiny:llama"))


def test_only_training_sees_groups() -> None:
    """What is measured is computed with full attention."""
    positions = examples(24)[:1].astype(np.int32)
    batch = TokenBatch(
        tokens=oracle.random_tokens(0, 1, 24),
        positions=positions,
        segment_ids=np.ones_like(positions),
        weights=np.ones(positions.shape, np.float32),
    )
    runs = [described(group) for group in (0, 8)]
    base = build.fill_base(runs[0], lambda done, total: None)
    values = base | build.fill_adapter(runs[0], base)
    losses = []
    for run in runs:
        for objective in (run.objective, training_objective(run)):
            loss = jax.jit(
                lambda values, run=run, f=objective: f(run.skeleton.model(values), batch)
            )
            losses.append(float(loss(values)[0]))
    assert losses[0] == losses[1] == losses[2]
    assert abs(losses[3] - losses[0]) > 1e-4


def test_heads_that_cannot_be_halved_are_refused() -> None:
    checkpoint = open_checkpoint("tiny:llama")
    odd = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    checkpoint = dataclasses.replace(checkpoint, config={**checkpoint.config, **odd})
    config = RunConfig(train=Train(attention_group=8))
    with pytest.raises(ConfigError, match="6 heads with 3 key heads"):
        build.describe(config, make_mesh({"fsdp": 1}, jax.devices()[:1]), checkpoint)
