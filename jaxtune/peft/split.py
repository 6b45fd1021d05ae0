"""LoRAs that start as a part of the base's weights instead of at zero.

    PiSSA   s A B = the R largest singular triplets of W; the base is W - s A B
    LoftQ   T times: Q = quantized W - s A B, s A B = the R largest triplets of W - Q; the base is Q

With triplets U_R, S_R, V_R, A [D_in, R] = U_R sqrt(S_R / s) and B [R, D_out] = sqrt(S_R / s) V_R^T.
With PiSSA the model starts as the base, with LoftQ nearer to it than Q is.

Meng et al. 2024, arXiv 2404.02948, and PEFT 0.21.2 (`LoraLayer.pissa_init`); Li et al. 2023, arXiv
2310.08659, and PEFT's `loftq_init`, which leaves s out and so means alpha = rank.

Folders that PEFT saved keep what A and B became, and not the base that they were trained on: PEFT
makes it again when it loads them, of starts that say how (`AGAIN`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the pairs start.

    Attributes:
        init: "random" (B is zero), "pissa" or "loftq".
        pissa_iterations: power iterations of a randomized SVD; 0: an exact one.
        loftq_iterations: T.
    """

    init: str = "random"
    pissa_iterations: int = 0
    loftq_iterations: int = 1


class Split(NamedTuple):
    """What becomes of a kernel [D_in, D_out]; float32.

    Attributes:
        a, b: the first values of the adapter, [D_in, R] and [R, D_out].
        taken: a pair whose product, scaled, the base loses; None: it stays whole.
    """

    a: jax.Array
    b: jax.Array
    taken: tuple[jax.Array, jax.Array] | None


def pissa(weight: jax.Array, config: Any, start: Start, rng: np.random.Generator) -> Split:
    """The kernel's largest singular triplets as an adapter, and taken out of the base.

    Args:
        weight: float32 [D_in, D_out].
        config: the layer's own knobs of LoRA.
        start: how exactly.
        rng: of a randomized SVD.
    """
    if start.pissa_iterations:
        found = randomized_svd(weight, config.rank, start.pissa_iterations, rng)
        pair = _pair(*found, config)
    else:
        pair = largest(weight, config)
    return Split(pair[0], pair[1], pair)


def largest(weight: jax.Array, config: Any) -> tuple[jax.Array, jax.Array]:
    """A and B whose scaled product is that of the largest R triplets of a kernel: PiSSA's."""
    u, s, vt = jnp.linalg.svd(weight, full_matrices=False)
    return _pair(u, s, vt, config)


def first_columns(weight: jax.Array, config: Any) -> tuple[jax.Array, jax.Array]:
    """A and B of OLoRA (Büyükakyüz 2024, arXiv 2406.01775): with W^T = Q T, T triangular, the first
    R rows of T, transposed, and the first R columns of Q, transposed; the base loses s A B."""
    q, t = jnp.linalg.qr(weight.T)
    return t[: config.rank].T, q[:, : config.rank].T


def loftq(
    weight: jax.Array, config: Any, start: Start, rounded: Callable[[jax.Array], jax.Array]
) -> Split:
    """The largest part of what quantizing a kernel loses, as an adapter.

    Args:
        weight: float32 [D_in, D_out].
        config: the layer's own knobs of LoRA.
        start: how often.
        rounded: a kernel -> the numbers that the base has for it, quantized; float32.
    """
    pair = taken = None
    for _ in range(start.loftq_iterations):
        taken = pair
        lost = weight - rounded(weight if taken is None else without(weight, taken, config.scale))
        pair = largest(lost, config)
    assert pair is not None
    return Split(pair[0], pair[1], taken)


def _pair(u: jax.Array, s: jax.Array, vt: jax.Array, config: Any) -> tuple[jax.Array, jax.Array]:
    """A and B whose scaled product is that of the first R triplets."""
    root = jnp.sqrt(s[: config.rank] / config.scale)
    return u[:, : config.rank] * root, root[:, None] * vt[: config.rank]


def randomized_svd(
    weight: jax.Array, rank: int, iterations: int, rng: np.random.Generator
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the largest triplets of a matrix [D_in, D_out]: U [D_in, R], S [R], V^T [R, D_out].

    Halko et al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1, with R random directions and no
    more, as torch's `svd_lowrank` in PEFT.
    """
    sketch = jnp.asarray(rng.standard_normal((weight.shape[1], rank), np.float32))
    basis = jnp.linalg.qr(weight @ sketch)[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(weight @ jnp.linalg.qr(weight.T @ basis)[0])[0]
    u, s, vt = jnp.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vt


def without(
    weight: jax.Array, taken: tuple[np.ndarray | jax.Array, np.ndarray | jax.Array], scale: float
) -> jax.Array:
    """What the base keeps of a kernel: W - s A B."""
    a, b = taken
    return weight - scale * (jnp.asarray(a) @ jnp.asarray(b))


# PEFT's `init_lora_weights` -> of a kernel and knobs, the pair that its base has lost.
AGAIN: Mapping[str, Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]] = MappingProxyType(
    {"pissa": largest, "olora": first_columns}
)
# How `init_lora_weights` begins, of starts that PEFT does not make again -> what it does.
LOST = MappingProxyType(
    {
        "pissa_niter": "draws another one at every load",
        "corda": "wants the data of its start again",
        "lora_ga": "takes the whole one",
        "loftq": "quantizes again",
    }
)
