"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in Hugging Face's half-split layout.

Types of scaling and their formulas follow transformers 5.23 `modeling_rope_utils`: default, linear,
dynamic (NTK-aware, base grows with the longest position), llama3, yarn (arXiv 2309.00071)
and longrope (arXiv 2402.13753: other factors once positions exceed the original ones).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Parameters of the rotation; the names are those of `rope_parameters` in config.json."""

    head_dim: int
    theta: float
    type: str = "default"
    factor: float = 1.0
    max_positions: int = 0  # max_position_embeddings, for dynamic
    original_max_positions: int = 0  # for llama3, yarn and longrope
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # for longrope, one for each frequency
    long_factor: tuple[float, ...] = ()


def rope_table(positions: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, 1, H], for int32 positions [B, T]."""
    if rope.type == "dynamic":
        frequencies, factor = _dynamic(positions, rope), 1.0
    elif rope.type == "longrope":
        frequencies, factor = _longrope(positions, rope)
    else:
        frequencies, factor = _STATIC[rope.type](rope)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, H/2]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _inverse_powers(rope: Rope) -> np.ndarray:
    exponents = np.arange(0, rope.head_dim, 2, dtype=np.float32) / rope.head_dim
    return (1.0 / rope.theta**exponents).astype(np.float32)


def _default(rope: Rope) -> tuple[np.ndarray, float]:
    return _inverse_powers(rope), 1.0


def _linear(rope: Rope) -> tuple[np.ndarray, float]:
    return _inverse_powers(rope) / np.float32(rope.factor), 1.0


def _dynamic(positions: jax.Array, rope: Rope) -> jax.Array:
    length = jnp.maximum(positions.max() + 1, rope.max_positions).astype(jnp.float32)
    growth = rope.factor * length / rope.max_positions - (rope.factor - 1)
    theta = rope.theta * growth ** (rope.head_dim / (rope.head_dim - 2))
    return 1.0 / theta ** (jnp.arange(0, rope.head_dim, 2, dtype=jnp.float32) / rope.head_dim)


def _longrope(positions: jax.Array, rope: Rope) -> tuple[jax.Array, float]:
    """Long factors for the whole row once it is longer than the original positions.

    Keys in a cache keep the factors of their time; transformers 5 computes its cache anew when an
    answer grows across the switch.
    """
    short, long = (
        _inverse_powers(rope) / np.array(factors, np.float32)
        for factors in (rope.short_factor, rope.long_factor)
    )
    factor = rope.attention_factor
    if factor is None:
        growth = math.log(max(rope.factor, 1.0)) / math.log(rope.original_max_positions)
        factor = math.sqrt(1 + growth)
    return jnp.where(positions.max() + 1 > rope.original_max_positions, long, short), factor


def _llama3(rope: Rope) -> tuple[np.ndarray, float]:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    frequencies = _inverse_powers(rope)
    wavelengths = 2 * np.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    slowed = np.where(
        wavelengths > rope.original_max_positions / low, frequencies / rope.factor, blended
    )
    kept = wavelengths < rope.original_max_positions / high
    return np.where(kept, frequencies, slowed).astype(np.float32), 1.0


def _yarn(rope: Rope) -> tuple[np.ndarray, float]:
    """Dimensions that turn often are kept, those that turn seldom are slowed by `factor`."""
    half = rope.head_dim // 2

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = _inverse_powers(rope)
    scaled = frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: Rope) -> float:
    def growth(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


_STATIC = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
