import dataclasses
import functools
import math
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import ops
from jaxtune.ops.cross_entropy import IMPLEMENTATIONS, Logits, Penalties, chunked, token_logprobs
from jaxtune.sharding.mesh import make_mesh
from tests import tolerances
from tests.ops import cross_entropy_cases
from tests.oracle import difference

CASES = range(5)
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 220)]


def random_case(seed: int, b: int, t: int, d: int, vocab: int, *, transposed: bool) -> tuple:
    random = np.random.default_rng(seed)
    x = random.normal(size=(b, t, d)).astype(np.float32)
    w = random.normal(size=(vocab, d) if transposed else (d, vocab)).astype(np.float32)
    targets = random.integers(0, vocab, (b, t)).astype(np.int32)
    weights = random.choice([0, 0.5, 1, 2.0], (b, t)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), targets, weights


def dense(x: Any, w: Any, targets: Any, weights: Any, *, transposed: bool) -> tuple:
    logits = jnp.einsum("btd,vd->btv" if transposed else "btd,dv->btv", x, w)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum(), (weights * (logits.argmax(-1) == targets)).sum()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "skipped"),
    [
        (2, 16, slice(0)),  # one chunk
        (8, 150, slice(0)),  # chunks of 64 tokens a row and a remainder
        (8, 150, slice(60, 130)),  # the second chunk has no target
        (600, 3, slice(0)),  # more rows than tokens in a chunk
    ],
)
def test_values_and_gradients_are_those_of_full_logits(
    b: int, t: int, skipped: slice, transposed: bool
):
    x, w, targets, weights = random_case(t, b, t, 8, 33, transposed=transposed)
    weights[:, skipped] = 0

    def run(function: Any) -> Any:
        def total(x: Any, w: Any) -> Any:
            loss, correct = function(x, w, targets, weights, transposed=transposed)
            return 3 * loss, (loss, correct)

        (_, sums), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, w)
        return *sums, *grads

    expected = jax.jit(run, static_argnums=0)(dense)
    got = jax.jit(run, static_argnums=0)(ops.cross_entropy)
    for name, value, right in zip(("loss", "correct", "dx", "dw"), got, expected, strict=True):
        assert difference(value, right) <= tolerances.OPS, name


def test_only_the_gradients_asked_for_are_computed():
    x, w, targets, weights = random_case(0, 2, 16, 8, 33, transposed=False)
    loss = functools.partial(ops.cross_entropy, targets=targets, weights=weights, transposed=False)

    def shapes(argnums: Any) -> set[tuple[int, ...]]:
        """Shapes of the results of all matrix products."""
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: loss(x, w)[0], argnums))(x, w)
        found = set()

        def visit(jaxpr: Any) -> None:
            for equation in jaxpr.eqns:
                if equation.primitive.name == "dot_general":
                    found.add(equation.outvars[0].aval.shape)
                for inner in jaxprs_in_params(equation.params):
                    visit(inner)

        visit(jaxpr.jaxpr)
        return found

    assert (8, 33) not in shapes(0) and (33, 8) not in shapes(0)
    assert {(8, 33), (33, 8)} & shapes((0, 1))


def test_no_array_holds_the_logits_of_all_tokens():
    x, w, targets, weights = random_case(0, 4, 1024, 8, 4099, transposed=True)

    def loss(x: Any) -> Any:
        return ops.cross_entropy(x, w, targets, weights, transposed=True)[0]

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 4099 * 4 / 2


def test_loss_without_gradient():
    x, w, targets, weights = random_case(1, 2, 30, 8, 33, transposed=True)
    got = ops.cross_entropy(x, w, targets, weights, transposed=True)
    expected = dense(x, w, targets, weights, transposed=True)
    assert difference(got[0], expected[0]) <= tolerances.OPS
    assert float(got[1]) == float(expected[1])


def test_nothing_to_learn_is_zero():
    x, w, targets, weights = random_case(2, 2, 10, 8, 33, transposed=False)

    def loss(x: Any) -> Any:
        return ops.cross_entropy(x, w, targets, 0 * weights, transposed=False)[0]

    value, gradient = jax.value_and_grad(loss)(x)
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_bfloat16_is_close():
    x, w, targets, weights = random_case(3, 2, 40, 16, 50, transposed=True)
    half = jnp.asarray(x, jnp.bfloat16)

    def total(x: Any, w: Any) -> Any:
        return ops.cross_entropy(x, w, targets, weights, transposed=True)[0]

    value, (dx, dw) = jax.value_and_grad(total, (0, 1))(half, w)
    expected, (ex, ew) = jax.value_and_grad(total, (0, 1))(x, w)
    assert value.dtype == jnp.float32 and dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert difference(value, expected) <= 5e-3
    assert difference(dx, ex) <= tolerances.OPS_BFLOAT16
    assert difference(dw, ew) <= tolerances.OPS_BFLOAT16


@pytest.mark.parametrize("seed", [*CASES, *SLOW])
def test_random_cases(seed: int):
    case = cross_entropy_cases.random_case(seed)
    limit = tolerances.OPS if case.dtype == jnp.float32 else tolerances.OPS_BFLOAT16
    for found in (cross_entropy_cases.differences, cross_entropy_cases.logprob_differences):
        for name, value in found(case, "chunked").items():
            if name != "correct" or case.dtype == jnp.float32:  # near ties change in bfloat16
                assert value <= limit, (name, value)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_are_those_of_torch(seed: int, implementation: str):
    import torch

    case = dataclasses.replace(cross_entropy_cases.random_case(seed), dtype=jnp.float32)
    x, w = (torch.tensor(a, requires_grad=True) for a in (case.x, case.w))
    logits = case.logits.scale * (x @ (w.T if case.transposed else w))
    if case.logits.softcap:
        logits = case.logits.softcap * torch.tanh(logits / case.logits.softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        torch.tensor(case.targets).long().flatten(),
        label_smoothing=case.penalties.label_smoothing,
        reduction="none",
    )
    losses = losses + case.penalties.z_loss * torch.logsumexp(logits, -1).flatten() ** 2
    expected = (losses * torch.tensor(case.weights).flatten()).sum()
    expected.backward()

    def loss(x: Any, w: Any) -> Any:
        return ops.cross_entropy(
            x,
            w,
            case.targets,
            case.weights,
            transposed=case.transposed,
            logits=case.logits,
            penalties=case.penalties,
            implementation=implementation,
        )[0]

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(case.x, case.w)
    assert difference(value, expected.item()) <= tolerances.OPS
    for got, tensor in zip(grads, (x, w), strict=True):
        assert tensor.grad is not None
        assert difference(got, tensor.grad) <= tolerances.OPS


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_chunks_cover_the_rows_that_count(n: int, size: int, data: st.DataObject):
    count = data.draw(st.integers(0, n))
    rows = np.random.default_rng(n).integers(1, 100, (n, 3))
    doubled, total = chunked.by_chunks(
        lambda a: (2 * a, a.sum()), size, (jnp.asarray(rows),), jnp.int32(count)
    )
    done = min(n, math.ceil(count / min(size, n)) * min(size, n))
    assert (doubled[:done] == 2 * rows[:done]).all() and not doubled[done:].any()
    assert total == rows[:done].sum()


@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_without_weight_cost_no_products(transposed: bool):
    x, w, targets, weights = random_case(5, 4, 512, 8, 33, transposed=transposed)
    weights[...] = 0
    weights[1::2, ::7] = 1  # 148 tokens: one chunk of 512
    targets[weights == 0] = -100
    calls = []

    def counted(x: Any, targets: Any, weights: Any, *rest: Any, **options: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return original(x, targets, weights, *rest, **options)

    original = chunked._chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_chunk", counted)
        loss, _ = ops.cross_entropy(x, w, targets, weights, transposed=transposed)
        jax.effects_barrier()
    expected, _ = dense(x, w, np.maximum(targets, 0), weights, transposed=transposed)
    assert len(calls) == 1 and difference(loss, expected) <= tolerances.OPS


def collectives(text: str) -> list[tuple[str, str, str]]:
    """(kind, shapes, where in the program) of every collective of a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)\(", line)
        if match:
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], match[1], name[1] if name else ""))
    return found


SHARDINGS = {  # of x [B, T, D] and of w, as (embed, vocab)
    "all": ((("data", "fsdp"), None, None), ("fsdp", "tensor")),
    "vocab only": ((None, None, None), (None, "tensor")),
    "rows that do not divide": ((None, None, None), (("data", "fsdp"), "tensor")),
    "rows and time": (("data", "fsdp", None), (None, "tensor")),
}


@pytest.mark.parametrize(
    ("layout", "transposed"), [("all", True), *((layout, False) for layout in SHARDINGS)]
)
def test_sharded_is_the_same(layout: str, transposed: bool):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    of_x, of_w = SHARDINGS[layout]
    of_w = of_w[::-1] if transposed else of_w
    shardings = tuple(NamedSharding(mesh, PartitionSpec(*axes)) for axes in (of_x, of_w))
    x, w, targets, weights = random_case(9, 4, 60, 16, 64, transposed=transposed)
    weights[:2] = 0  # devices with different numbers of tokens to do
    operands = [jax.device_put(a, s) for a, s in zip((x, w), shardings, strict=True)]
    options = {"transposed": transposed, "logits": Logits(0.5, 4.0)}
    penalties = Penalties(z_loss=1e-2, label_smoothing=0.1)

    def both(x: Any, w: Any, shardings: Any) -> Any:
        given = options | {"shardings": shardings}
        loss, correct = ops.cross_entropy(x, w, targets, weights, penalties=penalties, **given)
        logprobs = token_logprobs(x, w, targets, weights != 0, **given)
        return loss + (logprobs * weights * targets).sum(), (correct, logprobs)

    run = jax.jit(jax.value_and_grad(both, (0, 1), has_aux=True), static_argnums=2)
    (value, aux), grads = run(x, w, None)
    (sharded_value, sharded_aux), sharded_grads = run(*operands, shardings)
    for got, sharding in zip(sharded_grads, shardings, strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
    expected, got = (value, aux, grads), (sharded_value, sharded_aux, sharded_grads)
    for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert difference(eight, one) <= tolerances.SHARDED


@pytest.mark.parametrize("transposed", [False, True])
def test_no_logits_travel_and_the_weight_is_gathered_once(transposed: bool):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    b, t, d, vocab = 8, 300, 16, 1024
    of_x = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    axes = ("tensor", "fsdp") if transposed else ("fsdp", "tensor")
    of_w = NamedSharding(mesh, PartitionSpec(*axes))
    x = jax.ShapeDtypeStruct((b, t, d), jnp.float32, sharding=of_x)
    w = jax.ShapeDtypeStruct((vocab, d) if transposed else (d, vocab), x.dtype, sharding=of_w)
    targets = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=of_x)
    weights = jax.ShapeDtypeStruct((b, t), jnp.float32, sharding=of_x)

    def loss(x: Any, w: Any, targets: Any, weights: Any) -> Any:
        given = {"transposed": transposed, "shardings": (of_x, of_w)}
        return ops.cross_entropy(x, w, targets, weights, **given)[0]

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, targets, weights).compile()
    text = program.as_text()
    assert text
    found = collectives(text)
    gathers = [shapes for kind, shapes, _ in found if kind == "all-gather"]
    (part,) = gathers  # the part of the vocabulary, once
    assert part.startswith("f32[512,16]" if transposed else "f32[16,512]")
    in_loop = [(kind, shapes) for kind, shapes, where in found if "while" in where]
    assert in_loop and all(kind == "all-reduce" for kind, _ in in_loop)
    sizes = {size for _, shapes in in_loop for size in re.findall(r"\[([\d,]*)\]", shapes)}
    (size,) = sizes  # numbers per token of a chunk
    assert int(size) <= chunked.CHUNK_TOKENS


def test_what_cannot_be_done_is_refused():
    x, w, targets, weights = random_case(4, 2, 8, 8, 32, transposed=False)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})

    def sharded(of_x: tuple, of_w: tuple, **options: Any) -> Any:
        shardings = tuple(NamedSharding(mesh, PartitionSpec(*axes)) for axes in (of_x, of_w))
        return ops.cross_entropy(
            x, w, targets, weights, transposed=False, shardings=shardings, **options
        )

    with pytest.raises(ValueError, match="cannot work on x"):
        sharded((None, None, "fsdp"), (None, "tensor"))
    with pytest.raises(ValueError, match="cannot work on x"):
        sharded(("tensor",), (None, "tensor"))
    with pytest.raises(NotImplementedError, match="sharded vocabulary"):
        sharded((None,), (None, "tensor"), implementation="reference")
    with pytest.raises(NotImplementedError, match="not bfloat16"):
        ops.cross_entropy(
            x,
            w,
            targets,
            weights,
            transposed=False,
            loss_dtype=jnp.bfloat16,
            implementation="reference",
        )
    with pytest.raises(NotImplementedError, match="weights have no gradient"):
        jax.grad(lambda v: ops.cross_entropy(x, w, targets, v, transposed=False)[0])(weights)
    assert set(IMPLEMENTATIONS) == {"chunked", "pallas_tpu", "reference"}
