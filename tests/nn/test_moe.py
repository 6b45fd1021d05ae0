"""Mixtures of experts against plain loops, on one device and on many."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import models, ops, tree
from jaxtune.data import TokenBatch
from jaxtune.nn import quantized
from jaxtune.nn.experts import Experts
from jaxtune.nn.mlp import Gate
from jaxtune.nn.moe import MoE, MoEConfig
from jaxtune.nn.params import Policy
from jaxtune.objectives.sft import sft
from jaxtune.quant import dequantize, quantize
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import make_mesh
from tests import oracle, tolerances

WIDTH, HIDDEN, EXPERTS, TOP = 16, 24, 4, 2


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, shape[-2] ** -0.5, shape).astype(np.float32)


def test_rows_meet_the_matrix_of_their_group_and_gradients_are_those_of_a_loop():
    x, w, g = random(0, 12, 8), random(1, 3, 8, 5), random(2, 12, 5)
    sizes = np.array([5, 0, 7], np.int32)
    owner = np.repeat(np.arange(3), sizes)

    def ours(x: Any, w: Any) -> jax.Array:
        return (ops.grouped_matmul(x, w, jnp.asarray(sizes)) * g).sum()

    def loop(x: Any, w: Any) -> jax.Array:
        return (jnp.stack([x[i] @ w[e] for i, e in enumerate(owner)]) * g).sum()

    got, expected = (jax.value_and_grad(f, (0, 1))(x, w) for f in (ours, loop))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert oracle.difference(mine, theirs) <= tolerances.OPS
    q = quantize(jnp.asarray(random(3, 3, 64, 5)), "nf4")
    rows = random(4, 12, 64)
    dense = ops.grouped_matmul(rows, dequantize(q, jnp.float32), jnp.asarray(sizes))
    np.testing.assert_array_equal(ops.grouped_matmul(rows, q, jnp.asarray(sizes)), dense)


def described(policy: Policy, *, bias: bool = True) -> tree.Skeleton:
    """Experts with biases, as those of gpt-oss."""
    fields: dict[str, Any] = {"gate": Gate("silu"), "bias": bias, "policy": policy}
    return tree.describe(lambda: Experts(EXPERTS, WIDTH, HIDDEN, **fields, rngs=nnx.Rngs(0)))


def values(skeleton: tree.Skeleton) -> dict[str, np.ndarray]:
    return {
        name: random(i, *leaf.shape) for i, (name, leaf) in enumerate(skeleton.abstract().items())
    }


def summed(skeleton: tree.Skeleton, weights: np.ndarray, chosen: np.ndarray) -> Any:
    """(parameters, x) -> a number and its gradients, through `Experts`."""
    out = random(8, *chosen.shape[:2], WIDTH)

    def loss(params: Any, x: Any, weights: Any) -> jax.Array:
        return (skeleton.model(params)(x, jnp.asarray(chosen), weights) * out).sum()

    return lambda params, x: jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, x, weights)


def routed(rows: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, experts of which one is never chosen, weights."""
    draw = np.random.default_rng(5)
    chosen = np.stack([draw.permutation(EXPERTS - 1)[:TOP] for _ in range(rows * tokens)])
    weights = draw.uniform(0.1, 1, (rows, tokens, TOP)).astype(np.float32)
    return random(9, rows, tokens, WIDTH), chosen.reshape(rows, tokens, TOP), weights


def test_experts_are_their_mlps_weighted():
    skeleton = described(Policy())
    params = values(skeleton)
    x, chosen, weights = routed(2, 5)
    got = skeleton.model(params)(x, jnp.asarray(chosen), weights)
    expected = np.zeros_like(x)
    for b, t, k in np.ndindex(chosen.shape):
        e = chosen[b, t, k]

        def layer(name: str, row: np.ndarray, e: int = e) -> np.ndarray:
            return row @ params[f"{name}.kernel"][e] + params[f"{name}.bias"][e]

        gate = layer("gate_proj", x[b, t])
        hidden = gate / (1 + np.exp(-gate)) * layer("up_proj", x[b, t])
        expected[b, t] += weights[b, t, k] * layer("down_proj", hidden)
    assert oracle.difference(got, expected) <= tolerances.OPS


@pytest.mark.parametrize(
    ("axes", "rows"),
    [
        ({"fsdp": 2, "expert": 2, "tensor": 2}, 4),
        ({"data": 1, "sequence": 2, "expert": 4}, 4),
        ({"data": 1, "tensor": 4, "expert": 2}, 1),  # one row: whole on every shard
    ],
)
def test_experts_on_a_mesh_are_those_of_one_device(axes: dict[str, int], rows: int):
    x, chosen, weights = routed(rows, 8)
    alone = described(Policy())
    params = values(alone)
    expected = summed(alone, weights, chosen)(params, x)
    mesh = make_mesh(axes)
    skeleton = described(Policy(mesh=mesh))
    placed = rules.placed(skeleton, mesh)
    assert "expert" in placed["gate_proj.kernel"].sharding.spec[0]
    params = {name: jax.device_put(params[name], placed[name].sharding) for name in params}
    got = summed(skeleton, weights, chosen)(params, x)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert oracle.difference(mine, theirs) <= tolerances.SHARDED


def test_quantized_experts_whose_blocks_cannot_be_cut_are_whole():
    """Three blocks of 64 rows on two shards: columns of gate and up could be cut."""
    hidden, width = 192, 64
    _, chosen, weights = routed(4, 8)
    x = random(9, 4, 8, width)
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    kernels = {
        f"{name}.kernel": quantize(jnp.asarray(random(i, EXPERTS, *shape)), "nf4")
        for i, (name, shape) in enumerate(shapes.items())
    }
    biases = {
        f"{name}.bias": random(i, EXPERTS, n) for i, (name, (_, n)) in enumerate(shapes.items())
    }

    def found(policy: Policy) -> Any:
        def make() -> Experts:
            fields: dict[str, Any] = {"gate": Gate("silu"), "bias": True, "policy": policy}
            experts = Experts(EXPERTS, width, hidden, **fields, rngs=nnx.Rngs(0))
            quantized.put(experts, kernels)
            return experts

        def loss(x: Any, biases: Any) -> jax.Array:
            y = skeleton.model(kernels | biases)(x, jnp.asarray(chosen), weights)
            return (y * random(8, *x.shape)).sum()

        skeleton = tree.describe(make)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, biases))

    mesh = make_mesh({"data": 1, "expert": 4, "tensor": 2})
    for mine, theirs in zip(found(Policy(mesh=mesh)), found(Policy()), strict=True):
        assert oracle.difference(mine, theirs) <= tolerances.SHARDED


def test_rows_of_nobody_give_biases_no_gradient(monkeypatch: pytest.MonkeyPatch):
    """Kernels may leave anything behind the last group, in gradients as well."""

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return forward(x, w, sizes)[0]

    def forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
        owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
        real = (owner < len(w))[:, None]
        rows = jnp.minimum(owner, len(w) - 1)
        return jnp.where(real, jnp.einsum("md,mdf->mf", x, w[rows]), 7.0), (w, rows, real)

    def backward(saved: Any, g: jax.Array) -> Any:
        w, rows, real = saved
        return jnp.where(real, jnp.einsum("mf,mdf->md", g, w[rows]), 7.0), jnp.zeros_like(w), None

    product.defvjp(forward, backward)
    monkeypatch.setattr(ops, "grouped_matmul", lambda *args, implementation: product(*args))
    skeleton = described(Policy())
    x, chosen, weights = routed(1, 5)
    params = values(skeleton)
    biases = {name: array for name, array in params.items() if name.endswith("bias")}
    # Half of the choices are of experts that another shard has.
    chosen = np.where(np.arange(TOP) == 0, EXPERTS + 1, chosen)

    def loss(biases: Any, x: Any, chosen: Any, weights: Any) -> jax.Array:
        return skeleton.model(params | biases)(x, jnp.asarray(chosen), weights).sum()

    got = jax.grad(loss)(biases, x, chosen, weights)
    expected = jax.grad(loss)(biases, x, chosen[..., 1:], weights[..., 1:])
    for name in biases:
        assert oracle.difference(got[name], expected[name]) <= tolerances.OPS, name


def results(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything that a program computes."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from results(inner)


def test_no_array_has_tokens_and_experts_and_frozen_experts_get_no_gradient():
    config = MoEConfig(num_experts=8, top_k=TOP, expert_size=HIDDEN)
    fields: dict[str, Any] = {"activation": "silu", "policy": Policy()}
    skeleton = tree.describe(lambda: MoE(WIDTH, config, **fields, rngs=nnx.Rngs(0)))
    params = values(skeleton)
    tokens = 64
    x = random(1, 1, tokens, WIDTH)
    traced = jax.make_jaxpr(jax.grad(lambda x: skeleton.model(params)(x).sum()))(x)
    shapes = list(results(traced.jaxpr))
    assert any(shape == (tokens * TOP, HIDDEN) for shape in shapes)
    assert max(np.prod(shape) for shape in shapes) <= tokens * TOP * HIDDEN
    assert not [shape for shape in shapes if shape[:1] == (8,) and len(shape) == 3]


def test_imbalance_is_that_of_transformers_for_each_example_by_itself():
    import torch

    fields = models.family("mixtral").TINY | {"num_hidden_layers": 1}
    hf = oracle.hf_model({key: value for key, value in fields.items() if value is not None})
    loaded = oracle.load(oracle.checkpoint_of(hf), imbalance=True)
    tokens = oracle.random_tokens(1, 1, 14)
    found = []
    for part in (slice(0, 6), slice(6, 11)):
        ids = torch.tensor(tokens[:, part]).long()
        found.append(float(hf(ids, output_router_logits=True).aux_loss.detach()))
    positions = np.concatenate([np.arange(6), np.arange(5), np.zeros(3)]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 0], [6, 5, 3]).astype(np.int32)[None]  # two examples and padding
    weights = ((segments > 0) & (positions > 0)).astype(np.float32)
    batch = TokenBatch(tokens, positions, segments, weights)

    @jax.jit
    def computed(params: Any) -> tuple[jax.Array, list[jax.Array]]:
        model = loaded.skeleton.model(params)
        losses = [sft(model, batch, loss_dtype=jnp.float32, imbalance=x)[0] for x in (0.0, 0.5)]
        return model.hidden_and_imbalance(tokens, positions, segments)[1], losses

    imbalance, losses = computed(loaded.params)
    np.testing.assert_allclose(imbalance[0, :11], np.repeat(found, [6, 5]), rtol=1e-5)
    added = 0.5 * (5 * found[0] + 4 * found[1])
    np.testing.assert_allclose(losses[1] - losses[0], added, rtol=1e-4)
