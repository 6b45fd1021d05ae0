"""JAX's splash attention and cuDNN's: what they answer, and what they refuse by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.attention import Columns, Mask, attention_with_lse, cudnn, make_operands, splash
from tests import tolerances
from tests.ops.attention_cases import Case, check


def random_case(t: int, mask: Mask, *, s: int = 0, dtype: Any = jnp.float32, **extras: Any) -> Case:
    random = np.random.default_rng(t)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    q, k, v = (
        (jnp.asarray(normal(2, x, n, 64), dtype)) for x, n in ((t, 4), (s or t, 2), (s or t, 2))
    )
    return Case(
        seed=t,
        features=frozenset(),
        operands=make_operands(q, k, v, mask, **extras),
        dy=normal(2, t, 4, 64),
        dlse=normal(2, t, 4),
    )


def packed(t: int, **options: Any) -> Mask:
    ids = jnp.asarray(np.sort(np.random.default_rng(t).integers(1, 5, (2, t)), axis=1), jnp.int32)
    return Mask(query_segments=ids, key_segments=ids, **options)


SPLASH = {
    "segments": (packed(256), {"sinks": jnp.asarray([-1.0, 0.5, 0.0, 2.0])}),
    "window": (Mask(window=70), {"softcap": 5.0}),
    "causal": (Mask(), {}),
    "two-sided window": (packed(256, causal=False, window=50), {}),
    "all": (Mask(causal=False), {"scale": 0.2}),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "segments" else pytest.param(name, marks=pytest.mark.slow) for name in SPLASH],
)
def test_splash_equals_the_reference(name: str):
    mask, extras = SPLASH[name]
    attend = functools.partial(splash.attend, interpret=True)
    check(attend, random_case(256, mask, **extras), tolerances.OPS)


@pytest.mark.parametrize(
    ("mask", "extras"),
    [
        (Mask(), {}),
        (Mask(causal=False), {"scale": 0.3}),
        (Mask(window=7), {}),
        (Mask(), {"s": 50}),
    ],
    ids=["causal", "all", "window", "lengths"],
)
def test_cudnn_is_asked_for_the_same_attention(
    mask: Mask, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Its arguments mean what ours do: JAX's own XLA path gets them here."""
    asked = jax.nn.dot_product_attention

    def on_cpu(*args: Any, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    case = random_case(40, mask, dtype=jnp.bfloat16, **extras)
    check(cudnn.attend, case, tolerances.OPS_BFLOAT16)


COMMON = {
    "prefix": (Mask(prefix=2), {}),
    "columns": (Mask(columns=Columns(lts=jnp.zeros((2, 128), jnp.int32))), {}),
    "alibi": (Mask(), {"alibi": jnp.ones(4)}),
    "query_offset": (Mask(), {"query_offset": jnp.int32(0)}),
}
REFUSED = {
    splash: COMMON | {"lengths": (Mask(), {"s": 256})},
    cudnn: COMMON
    | {
        "segments": (packed(128), {}),
        "softcap": (Mask(), {"softcap": 5.0}),
        "sinks": (Mask(), {"sinks": jnp.zeros(4)}),
        "lengths": (Mask(window=9), {"s": 256}),
        "window": (Mask(window=9, causal=False), {}),
    },
}


@pytest.mark.parametrize("module", [splash, cudnn], ids=["splash", "cudnn"])
def test_what_a_library_lacks_is_refused_by_name(module: Any):
    for name, (mask, extras) in REFUSED[module].items():
        operands = random_case(128, mask, dtype=jnp.bfloat16, **extras).operands
        with pytest.raises(NotImplementedError, match=name):
            module.attend(operands)


def test_other_limits_of_the_libraries_are_refused():
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        splash.attend(random_case(100, Mask()).operands)
    with pytest.raises(NotImplementedError, match="float32"):
        cudnn.attend(random_case(128, Mask()).operands)


def test_a_library_without_log_sum_exp_says_so(monkeypatch: pytest.MonkeyPatch):
    operands = random_case(8, Mask(), dtype=jnp.bfloat16).operands
    monkeypatch.setattr(cudnn, "attend", lambda operands: (operands.q, None))
    with pytest.raises(NotImplementedError, match="cudnn attention returns no log-sum-exp"):
        attention_with_lse(operands.q, operands.k, operands.v, implementation="cudnn")
