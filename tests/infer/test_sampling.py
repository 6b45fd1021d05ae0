"""Sampling against transformers' logits processors, and its own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.infer import Sampling, make_sampling
from jaxtune.infer.sampling import keep_top_p, penalize, sample

ROWS, VOCAB = 6, 50


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)


def keys(seed: int, count: int = ROWS) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def possible(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which tokens of each row are drawn in many draws."""
    hit = np.zeros(logits.shape, bool)
    draw = jax.jit(lambda keys: sample(jnp.asarray(logits), keys, None, sampling))
    for seed in range(600):
        hit[np.arange(len(logits)), draw(keys(seed, len(logits)))] = True
    return hit


def test_greedy_takes_the_likeliest(logits: np.ndarray) -> None:
    drawn = sample(jnp.asarray(logits), keys(0), None, Sampling())
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(logits: np.ndarray, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    expected = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(np.asarray(keep_top_p(jnp.asarray(logits), top_p)), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(logits: np.ndarray, penalty: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 9))
    seen = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen, tokens, True, axis=-1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(tokens), torch.tensor(logits)
    ).numpy()
    actual = penalize(jnp.asarray(logits), jnp.asarray(seen), penalty)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-6)


def test_top_k_and_top_p_are_applied_in_the_order_of_transformers(logits: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    kept = torch.tensor(logits[:2])
    for warp in (TemperatureLogitsWarper(2.5), TopKLogitsWarper(7), TopPLogitsWarper(0.8)):
        kept = warp(None, kept)
    sampling = make_sampling(temperature=2.5, top_k=7, top_p=0.8)
    np.testing.assert_array_equal(possible(logits[:2], sampling), np.isfinite(kept.numpy()))


def test_frequencies_follow_the_probabilities() -> None:
    weights = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    logits = jnp.broadcast_to(jnp.log(weights), (4000, 4))
    drawn = sample(logits, keys(3, 4000), None, make_sampling(temperature=1.0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, weights, atol=0.03)


def test_a_row_draws_the_same_alone_and_in_company(logits: np.ndarray) -> None:
    sampling, row_keys = make_sampling(temperature=1.0, top_k=20, top_p=0.9), keys(5)
    together = sample(jnp.asarray(logits), row_keys, None, sampling)
    alone = [
        int(sample(jnp.asarray(logits[i : i + 1]), row_keys[i : i + 1], None, sampling)[0])
        for i in range(ROWS)
    ]
    np.testing.assert_array_equal(together, alone)


def test_numbers_are_traced_and_switches_are_not() -> None:
    traces = []

    @jax.jit
    def draw(sampling: Sampling) -> jax.Array:
        traces.append(sampling)
        return sample(jnp.zeros((2, 5)), keys(0, 2), None, sampling)

    for temperature in (0.5, 0.7):
        draw(make_sampling(temperature=temperature))
    assert len(traces) == 1
    draw(make_sampling(temperature=0.7, top_p=0.9))
    assert len(traces) == 2


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    drawn = sample(jnp.zeros((3, 5)), keys(0, 3), None, make_sampling(temperature=1.0, top_k=99))
    assert drawn.shape == (3,)


def test_options_that_change_nothing_are_off() -> None:
    assert make_sampling(temperature=0.0, top_k=5, top_p=0.5) == Sampling()
    assert make_sampling() == Sampling()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_sampling(**wrong)
