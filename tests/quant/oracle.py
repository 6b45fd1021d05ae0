"""bitsandbytes, the oracle: its weight [F, D] is the kernel [D, F] transposed."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant

# Compiled once for all weights of a shape.
quantize = jax.jit(quant.quantize, static_argnames=("format", "double_quant"))
dequantize = jax.jit(quant.dequantize, static_argnames="dtype")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def functional() -> Any:
    """bitsandbytes.functional; importing it would warn about a package for other processors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes").functional


def random_weight(rows: int, columns: int, dtype: str = "float32", seed: int = 0) -> Any:
    """A torch weight [F, D] with blocks of zeros, outliers, small numbers and ties."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, rows, generator=generator) * 0.02
    weight[0, :64] = 0
    weight[columns // 2, 5] = 3
    weight[columns // 3] *= 1e-4
    weight[-1, -64:-58] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.0])
    return weight.to(getattr(torch, dtype))


def as_kernel(weight: Any) -> jax.Array:
    """The jax kernel [D, F] of a torch weight, in its dtype."""
    dtype = DTYPES[str(weight.dtype).removeprefix("torch.")]
    return jnp.asarray(weight.float().numpy().T).astype(dtype)


def blocks_of(scale: jax.Array | quant.NestedScale) -> np.ndarray:
    """Our scales [G, F] as bitsandbytes' absmax, one after the other."""
    assert not isinstance(scale, quant.NestedScale)
    return np.ravel(np.transpose(scale))


def codes_of(packed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """bitsandbytes' codes, two in a byte, the first in the high half -> [F, D]."""
    packed = packed.numpy().reshape(-1)
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(shape)
