"""Random cases of the loss that every implementation is tested with, and the comparison."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import ops
from jaxtune.ops.cross_entropy import Logits, Penalties, token_logprobs
from tests.oracle import difference


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands and options of one call; `weights` are of the loss, cotangents of log p."""

    seed: int
    x: np.ndarray
    w: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    transposed: bool
    logits: Logits
    penalties: Penalties
    dtype: Any


def random_case(seed: int) -> Case:
    """Sizes on both sides of blocks and chunks, logits of a few units, every option in turn."""
    random = np.random.default_rng(seed)
    b, t = int(random.integers(1, 4)), int(random.integers(1, 90))
    d = int(random.choice([8, 40, 128, 256]))
    vocab = int(random.choice([random.integers(2, 700), 128, 384]))
    transposed = bool(random.integers(2))
    w = random.normal(0, 2 / np.sqrt(d), (vocab, d) if transposed else (d, vocab))
    weights = random.choice([0, 0.5, 1, 2], (b, t)) * random.choice([0, 1], (b, 1), p=[0.1, 0.9])
    return Case(
        seed,
        random.normal(size=(b, t, d)).astype(np.float32),
        w.astype(np.float32),
        random.integers(0, vocab, (b, t)).astype(np.int32),
        weights.astype(np.float32),
        transposed,
        Logits(float(random.choice([1, 0.25])), None if random.integers(2) else 5.0),
        Penalties(float(random.choice([0, 1e-2])), float(random.choice([0, 0.1]))),
        jnp.bfloat16 if seed % 4 == 3 else jnp.float32,
    )


def differences(case: Case, implementation: str) -> dict[str, float]:
    """Of the loss, the count and the gradients, from those of `reference` in float32."""

    def run(x: Any, w: Any, implementation: str) -> Any:
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
            )

        (value, correct), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
        return value, correct, *grads

    return _compare(case, ("loss", "correct", "dx", "dw"), run, implementation)


def logprob_differences(case: Case, implementation: str) -> dict[str, float]:
    """The same of the log-probabilities of tokens and their gradients for random cotangents."""
    g = np.random.default_rng(case.seed).normal(size=case.targets.shape).astype(np.float32)

    def run(x: Any, w: Any, implementation: str) -> Any:
        function = functools.partial(
            token_logprobs,
            targets=case.targets,
            mask=case.weights != 0,
            transposed=case.transposed,
            logits=case.logits,
            implementation=implementation,
        )
        value, backward = jax.vjp(lambda x, w: function(x, w), x, w)
        return value, *backward(g)

    return _compare(case, ("logprobs", "dx", "dw"), run, implementation)


def _compare(case: Case, names: tuple, run: Any, implementation: str) -> dict[str, float]:
    operands = [jnp.asarray(a, case.dtype) for a in (case.x, case.w)]
    exact = [a.astype(jnp.float32) for a in operands]
    run = jax.jit(run, static_argnums=2)
    expected = run(*exact, "reference")
    got = run(*operands, implementation)
    return {n: difference(a, e) for n, a, e in zip(names, got, expected, strict=True)}
