import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import build, objectives, optim
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenBatch, TokenRow
from jaxtune.data.packing import PACKERS, stack_rows
from jaxtune.schema import Data, Model, Peft, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import TrainState, make_eval_step, make_train_step
from tests import tolerances
from tests.oracle import difference

OBJECTIVE = functools.partial(objectives.OBJECTIVES["sft"], loss_dtype=jnp.float32)
RATE = optax.linear_schedule(0.5, 0.0, 100)


class Trainee:
    """tiny:llama under plain gradient descent, whose updates are gradients to compare."""

    def __init__(
        self,
        mesh: dict[str, int] | None = None,
        tx: Any = None,
        objective: Any = OBJECTIVE,
        **peft: Any,
    ):
        mesh = mesh or {"data": 1, "fsdp": 1, "tensor": 1}
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        config = RunConfig(
            model=Model(layers="scan"),
            peft=Peft(**({} if "method" in peft else {"rank": 4, "alpha": 8.0}) | peft),
            data=Data(train=("rows.jsonl",)),
        )
        checkpoint = open_checkpoint("tiny:llama")
        self.run = build.describe(config, make_mesh(mesh, devices), checkpoint)
        self.tx = tx or optax.sgd(RATE)
        values = build.fill_base(self.run, lambda done, total: None)
        values |= build.fill_adapter(self.run, values)
        random = np.random.default_rng(0)
        for name, array in sorted(values.items()):
            if name.endswith(".adapter.b"):
                noise = random.normal(0, 0.1, array.shape).astype(np.float32)
                values[name] = jax.device_put(noise, array.sharding)
        self.trainable = {name: np.asarray(values[name]) for name in self.run.trainable}
        self.frozen = {name: values[name] for name in self.run.frozen}
        abstract = build.abstract_state(self.run, self.tx)
        self.step = make_train_step(
            self.run.skeleton, objective, self.tx, RATE, 0, build.shardings(abstract)
        )

    def start(self) -> TrainState:
        """A new state; a step takes its memory over."""
        placed = {
            name: jax.device_put(array, self.run.trainable[name].sharding)
            for name, array in self.trainable.items()
        }
        return build.initial_state(self.run, self.tx, placed)

    def after(self, *batches: TokenBatch) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        """Trained parameters and metrics after a step on each batch."""
        state, rows = self.start(), []
        for batch in batches:
            state, metrics = self.step(state, self.frozen, self.run.put(batch))
            rows.append({name: float(value) for name, value in metrics.items()})
        return {name: np.asarray(array) for name, array in state.trainable.items()}, rows


@pytest.fixture(scope="module")
def lora() -> Trainee:
    return Trainee()


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return random_batch(0)


def random_batch(seed: int) -> TokenBatch:
    """[1, 8, 24]: rows of uneven length and weight; rows 2 and 3 train nothing."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(8):
        trained = random.integers(0, 2, random.integers(5, 24)).astype(bool)
        trained[0] = False
        tokens = random.integers(0, 259, len(trained)).astype(np.int32)
        rows.append([TokenRow(tokens, trained & (i not in (2, 3)))])
    return jax.tree.map(lambda leaf: leaf[None], stack_rows(rows, 24))


def assert_same(got: tuple, expected: tuple, tolerance: float) -> None:
    """The same metrics, and the same change of every parameter."""
    for metrics, right in zip(got[1], expected[1], strict=True):
        for name in right:
            assert abs(metrics[name] - right[name]) <= tolerance * abs(right[name]), name
    assert got[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        assert difference(got[0][name], array) <= tolerance, name


def test_accumulated_micro_batches_are_one_batch(lora: Trainee, batch: TokenBatch):
    whole = lora.after(batch)
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 2, 24), batch)
    assert not parts.weights[1].any() and parts.weights[0].sum() != parts.weights[2].sum()
    assert_same(lora.after(parts), whole, tolerances.GRADIENTS)


@pytest.mark.parametrize("packer", PACKERS)
def test_packed_rows_are_padded_rows(lora: Trainee, packer: str):
    random = np.random.default_rng(1)
    lengths = np.array([9, 16, 11, 5, 8, 20])
    rows = [
        TokenRow(random.integers(0, 259, n).astype(np.int32), np.arange(n) > 2) for n in lengths
    ]
    plan = PACKERS[packer](lengths, range(6), 24)
    packed = [
        [
            TokenRow(rows[i].tokens[start:stop], rows[i].trained[start:stop])
            for i, start, stop in row
        ]
        for row in map(plan.row, range(len(plan)))
    ]
    padded = [[piece] for row in packed for piece in row]
    assert len(packed) < len(padded) <= 8
    batches = [stack_rows(some + [[]] * (8 - len(some)), 24) for some in (packed, padded)]
    got, expected = (lora.after(jax.tree.map(lambda leaf: leaf[None], b)) for b in batches)
    assert_same(got, expected, tolerances.GRADIENTS)


def test_metrics(lora: Trainee, batch: TokenBatch):
    trained, rows = lora.after(batch, batch)
    first, second = rows
    assert first["tokens"] == (batch.segment_ids > 0).sum()
    assert first["targets"] == batch.weights.sum()
    assert (first["skipped"], first["bad_steps"]) == (0, 0)
    assert (first["learning_rate"], second["learning_rate"]) == pytest.approx((0.5, 0.495))
    assert 0 <= first["accuracy"] <= 1 and second["loss"] < first["loss"]
    evaluate = make_eval_step(lora.run.skeleton, OBJECTIVE)
    micro = jax.tree.map(lambda leaf: leaf[0], lora.run.put(batch))
    loss, sums = evaluate(lora.start().trainable, lora.frozen, micro)
    assert float(loss / sums["weight"]) == pytest.approx(first["loss"], rel=1e-6)
    assert float(sums["correct"] / sums["weight"]) == pytest.approx(first["accuracy"])
    once = lora.after(batch)[0]
    squares = [
        np.square((array - once[name]) / 0.5).sum() for name, array in lora.trainable.items()
    ]
    assert first["grad_norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-4)


def test_only_adapters_learn(lora: Trainee, batch: TokenBatch):
    before = {name: np.asarray(array).tobytes() for name, array in lora.frozen.items()}
    trained, _ = lora.after(batch)
    assert all(name.endswith((".adapter.a", ".adapter.b")) for name in trained)
    assert all((trained[name] != lora.trainable[name]).any() for name in trained)
    after = {name: np.asarray(array).tobytes() for name, array in lora.frozen.items()}
    assert before == after and len(before) > len(trained)


def test_everything_learns_in_full_fine_tuning(full: Trainee, batch: TokenBatch):
    trained, rows = full.after(batch, batch)
    assert not full.frozen and len(trained) == 12
    assert all((trained[name] != full.trainable[name]).any() for name in trained)
    assert rows[1]["loss"] < rows[0]["loss"]


@pytest.fixture(scope="module")
def full() -> Trainee:
    return Trainee(method="full")


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 8, "tensor": 1},
        pytest.param({"data": 1, "fsdp": 1, "tensor": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_are_one_device(mesh: dict[str, int], lora: Trainee):
    batches = [random_batch(seed) for seed in range(3)]
    spread = Trainee(mesh)
    kernel = spread.frozen["layers.0.mlp.up_proj.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (mesh["fsdp"] * mesh["tensor"])
    assert_same(spread.after(*batches), lora.after(*batches), tolerances.SHARDED)
    assert spread.step._cache_size() == 1


def test_eight_devices_are_one_device_in_full_fine_tuning(full: Trainee):
    batches = [random_batch(seed) for seed in range(2)]
    spread = Trainee({"data": 2, "fsdp": 2, "tensor": 2}, method="full")
    assert_same(spread.after(*batches), full.after(*batches), tolerances.SHARDED)


def adamw(trainable: Any) -> Any:
    numbers = optim.Optim(learning_rate=0.5, weight_decay=0.1)
    return optim.make_optimizer(numbers, RATE, dict.fromkeys(trainable, ("embed", None)))


@pytest.fixture(scope="module")
def noisy(lora: Trainee) -> Trainee:
    """With dropout and AdamW."""
    return Trainee(tx=adamw(lora.trainable), dropout=0.5)


def bytes_of(*trees: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]


def test_steps_that_are_not_finite_are_skipped_bit_for_bit(noisy: Trainee, batch: TokenBatch):
    put = noisy.run.put
    endless = dataclasses.replace(batch, weights=np.where(batch.weights > 0, np.float32(np.inf), 0))
    norm = np.asarray(noisy.frozen["norm.scale"]).copy()
    norm[3] = np.nan
    broken = noisy.frozen | {
        "norm.scale": jax.device_put(norm, noisy.run.frozen["norm.scale"].sharding)
    }
    state, _ = noisy.step(noisy.start(), noisy.frozen, put(batch))
    kept = bytes_of(state.trainable, state.opt_state)
    for count, (frozen, given) in enumerate(((broken, batch), (noisy.frozen, endless)), 1):
        state, metrics = noisy.step(state, frozen, put(given))
        assert bool(metrics["skipped"]) and int(metrics["bad_steps"]) == count
        assert not np.isfinite(float(metrics["loss"]))
        assert bytes_of(state.trainable, state.opt_state) == kept
        assert int(state.step) == 1 + count
    state, metrics = noisy.step(state, noisy.frozen, put(batch))
    assert (bool(metrics["skipped"]), int(metrics["bad_steps"])) == (False, 0)
    assert float(metrics["learning_rate"]) == pytest.approx(0.495), "skipped steps do not count"
    assert bytes_of(state.trainable, state.opt_state) != kept
    assert noisy.step._cache_size() == 1


def test_a_gradient_that_is_not_finite_is_skipped_too(batch: TokenBatch):
    def objective(model: Any, micro: Any) -> Any:
        loss, sums = OBJECTIVE(model, micro)
        zero = 0 * model.layers[0].attn.q_proj.adapter.b.get_value().sum()
        return loss + jnp.sqrt(zero), sums  # of which the derivative is infinite

    trainee = Trainee(objective=objective, target_modules=("q_proj",))
    trained, (metrics,) = trainee.after(batch)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    assert all((trained[name] == trainee.trainable[name]).all() for name in trained)


def test_dropout_follows_from_seed_and_step(noisy: Trainee, batch: TokenBatch):
    first, second = noisy.after(batch), noisy.after(batch)
    assert first[1] == second[1]
    assert all(first[0][name].tobytes() == second[0][name].tobytes() for name in first[0])
    state = noisy.start()
    later = jax.device_put(np.int32(1), state.step.sharding)
    state = dataclasses.replace(state, step=later)
    _, metrics = noisy.step(state, noisy.frozen, noisy.run.put(batch))
    assert float(metrics["loss"]) != first[1][0]["loss"]


def test_one_program_for_all_steps(noisy: Trainee):
    noisy.after(*(random_batch(seed) for seed in range(4)))
    assert noisy.step._cache_size() == 1


def test_a_batch_without_targets_changes_nothing(lora: Trainee, batch: TokenBatch):
    silent = dataclasses.replace(batch, weights=0 * batch.weights)
    trained, (metrics,) = lora.after(silent)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all((trained[name] == lora.trainable[name]).all() for name in trained)
