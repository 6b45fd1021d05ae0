"""NEFTune: how large the noise is, for whom, and that only training has it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import build, objectives
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.nn.noise import Noise
from jaxtune.nn.params import SeedKey
from jaxtune.schema import Data, Model, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh
from jaxtune.step import make_eval_step, make_train_step

# Three packed examples of 5, 2 and 6 tokens and 3 of padding; one example of 16.
SEGMENTS = np.array([[1] * 5 + [2] * 2 + [3] * 6 + [0] * 3, [1] * 16], np.int32)
LENGTHS = np.array([[5] * 5 + [2] * 2 + [6] * 6 + [3] * 3, [16] * 16])
WIDTH = 4096


def noise_of(seed: int, segments: Any) -> np.ndarray:
    slot = Noise(5.0)
    slot.key = SeedKey(jax.random.key(seed))
    return np.asarray(slot(jnp.zeros((2, 16, WIDTH)), segments))


def test_noise_is_uniform_by_the_length_of_each_example():
    noise = noise_of(0, SEGMENTS)
    bound = 5.0 / np.sqrt(LENGTHS * WIDTH)
    assert (np.abs(noise) <= bound[..., None]).all()
    assert (np.abs(noise).max(-1) >= 0.99 * bound).all()
    assert np.std(noise, -1) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert np.abs(noise.mean(-1)).max() <= 0.1 * bound.max()
    whole = np.abs(noise_of(0, None)).max((1, 2))
    assert whole == pytest.approx([5.0 / np.sqrt(16 * WIDTH)] * 2, rel=0.01)


def test_noise_follows_from_its_key_and_is_absent_without():
    assert (noise_of(0, SEGMENTS) == noise_of(0, SEGMENTS)).all()
    assert (noise_of(0, SEGMENTS) != noise_of(1, SEGMENTS)).mean() > 0.99
    x = jnp.ones((2, 16, 8))
    assert Noise(5.0)(x, SEGMENTS) is x


def test_only_train_steps_are_noisy_each_in_its_own_way():
    """With learning rate 0 a batch has another loss at every step, and the same if run again."""
    objective = functools.partial(objectives.OBJECTIVES["sft"], loss_dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 259, 12).astype(np.int32)
    rows = [TokenRow(tokens[:7], np.arange(7) > 1), TokenRow(tokens[7:], np.arange(5) > 1)]
    batch = jax.tree.map(lambda leaf: leaf[None], stack_rows([rows], 16))
    config = RunConfig(
        model=Model(layers="scan"), data=Data(train=("rows.jsonl",)), train=Train(neftune_alpha=5.0)
    )
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    run, tx = build.describe(config, mesh, open_checkpoint("tiny:llama")), optax.sgd(lambda n: 0.0)
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    frozen, trained = (
        {name: values[name] for name in part} for part in (run.frozen, run.trainable)
    )
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    evaluate = make_eval_step(run.skeleton, objective)
    value, sums = evaluate(trained, frozen, first)
    quiet = loss_without_noise(objective, trained, frozen, first)
    assert float(value / sums["weight"]) == pytest.approx(quiet, rel=1e-6)
    step = make_train_step(run.skeleton, objective, tx, lambda n: 0.0, 0)

    def two_steps() -> list[float]:
        state, losses = build.initial_state(run, tx, jax.tree.map(jnp.copy, trained)), []
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        return losses

    noisy = two_steps()
    assert noisy == two_steps() and len({round(loss, 4) for loss in (*noisy, quiet)}) == 3


def loss_without_noise(objective: Any, trained: Any, frozen: Any, batch: Any) -> float:
    """The loss of the same model described without noise."""
    config = RunConfig(model=Model(layers="scan"), data=Data(train=("rows.jsonl",)))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    run = build.describe(config, mesh, open_checkpoint("tiny:llama"))
    value, sums = make_eval_step(run.skeleton, objective)(trained, frozen, batch)
    return float(value / sums["weight"])
