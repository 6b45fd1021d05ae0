"""Orthogonal fine-tuning with block-diagonal rotations of the input (Qiu et al. 2023, arXiv
2306.07280; Liu et al. 2025, OFTv2, arXiv 2506.19847).

    y = (x R) W + bias        R = diag(R_1, R_2, ...), each [S, S] and orthogonal

R_k follows from a skew-symmetric Q_k by Cayley's map (I - Q)(I + Q)^-1, or by `cayley_terms` terms
of its Neumann series I + 2 Q + 2 Q^2 + ... + Q^(t-1), which needs no solve and is orthogonal only
nearly. The trained `angles` [D_in / S, S (S - 1) / 2] are the upper triangles of Q, row by row,
and start at zero: R = I. As in PEFT 0.21.2 (`OFT`), whose block size is the divisor of D_in nearest
to the one asked for, the smaller one in a tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import SAME
from jaxtune.nn.linear import Linear
from jaxtune.peft import base
from jaxtune.peft.base import Format, Tensor
from jaxtune.peft.beside import Biases, Saved
from jaxtune.peft.patterns import Layers
from jaxtune.peft.targets import Targets
from jaxtune.sharding.rules import TOKENS, constrained


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of OFT."""

    block_size: int
    cayley_terms: int


READS = (Config, Targets, Saved, Biases)
APART = True


def configure(config: Config, layers: Layers) -> dict[str, Config]:
    """The block size that divides each layer's input."""
    return {
        name: Config(
            block_size=nearest_divisor(d_in, config.block_size), cayley_terms=config.cayley_terms
        )
        for name, (d_in, _) in layers.items()
    }


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`; of two the smaller."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


class OFT(nnx.Module):
    """The adapter of one linear layer, or of a stack of them."""

    def __init__(self, linear: Linear, configs: Sequence[Config | None], config: Config):
        self.config = base.common(configs)
        sizes = base.shapes(tensors, configs, *linear.kernel.get_value().shape[-2:])
        self.angles = base.zeros(linear, sizes["angles"], (None, None))
        self.scale = base.constant(linear)

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        blocks = rotations(self.angles.get_value() * self.scale.get_value(), self.config)
        # Blocks of features may cross the shards of the width.
        whole = constrained(x, TOKENS, linear.policy.mesh)
        grid = whole.reshape(*x.shape[:-1], *blocks.shape[:2])
        turned = jnp.einsum("...kr,krc->...kc", grid, blocks.astype(x.dtype)).reshape(x.shape)
        return linear.project(constrained(turned, TOKENS, linear.policy.mesh))

    def seed(self, key: jax.Array, index: int) -> None:
        """OFT has no dropout."""


def rotations(angles: jax.Array, config: Config) -> jax.Array:
    """R_k for each row of `angles`: float32 [D_in / S, S, S]."""
    size = config.block_size
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((angles.shape[0], size, size)).at[:, rows, columns].set(angles)
    q = upper - upper.swapaxes(1, 2)
    identity = jnp.eye(size)
    if config.cayley_terms == 0:
        # R (I + Q) = I - Q, transposed, for Q^T = -Q.
        return jnp.linalg.solve(identity - q, identity + q).swapaxes(1, 2)
    total, power = identity + 2 * q, q
    for _ in range(2, config.cayley_terms - 1):
        power = power @ q
        total += 2 * power
    return total + power @ q


def attach(model: nnx.Module, adapters: base.Adapters) -> None:
    """Puts an OFT into the slots of the chosen layers."""
    base.fill_slots(model, adapters, OFT)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of `angles` (zero) or `scale` (one) of one adapted layer, float32."""
    del config, rng
    return np.ones(shape, np.float32) if leaf == "scale" else np.zeros(shape, np.float32)


def tensors(config: Config, d_in: int, d_out: int) -> dict[str, Tensor]:
    """What PEFT stores of a layer."""
    del d_out
    size = config.block_size
    return {"angles": Tensor("oft_R.weight", (d_in // size, size * (size - 1) // 2), SAME)}


def merge(
    leaf: str, array: np.ndarray, adapter: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """R W [D_in, D_out]; the bias stays."""
    if leaf != "kernel":
        return array
    blocks = np.asarray(rotations(jnp.asarray(adapter["angles"]), config))
    rows = array.reshape(blocks.shape[0], blocks.shape[1], -1)
    return (blocks @ rows).reshape(array.shape)


PEFT = Format(
    "OFT",
    defaults={
        "bias": "none",
        "block_share": False,
        "coft": False,
        "eps": 6e-05,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "r": 0,
    },
    ignored=frozenset(
        ("eps", "fan_in_fan_out", "init_weights", "layers_pattern", "module_dropout")
    ),
)


def to_peft(config: Config, layers: Mapping[str, Config]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "num_cayley_neumann_terms": config.cayley_terms or 5,
        "oft_block_size": config.block_size,
        "use_cayley_neumann": config.cayley_terms > 0,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes.

    Raises:
        ValueError: no block size, or a series too short to rotate.
    """
    size, terms = fields.get("oft_block_size"), fields.get("num_cayley_neumann_terms", 5)
    if type(size) is not int or size < 1 or type(terms) is not int or terms < 3:
        raise ValueError(f"oft_block_size={size!r}, num_cayley_neumann_terms={terms!r}")
    # PEFT computes the same for 3 terms as for 4.
    terms = max(terms, 4) if fields.get("use_cayley_neumann", True) else 0
    return Config(block_size=size, cayley_terms=terms)
