"""Adam with 8-bit moments.

Dettmers et al. 2022, arXiv 2110.02861, as bitsandbytes 0.50.2's `AdamW8bit`: blocks of 256 numbers
share a scale, their largest absolute value; the direction is made of moments that are not yet
rounded. Small matrices (fewer than 4096 elements, its `min_8bit_size`), vectors, and vocabulary
tables (as in transformers' Trainer) keep float32 moments.

bitsandbytes' blocks run along the rows of Hugging Face's layout, which are the columns of a kernel
[D, F] here. Where 256 divides D they are cut out in place: a TPU moves nothing for it, and either
axis can be sharded. Other matrices are flattened column by column.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.optim.dynamic import decode, encode
from jaxtune.tree import Params

BLOCK = 256
MIN_SIZE = 4096


class Adam8bitState(NamedTuple):
    """Both moments.

    Attributes:
        count: int32, applied steps.
        m, v: uint8 codes or float32, in the parameter's shape.
        m_scale, v_scale: of codes only, float32 [..., G, C], one for each block.
    """

    count: jax.Array
    m: Params
    v: Params
    m_scale: Params
    v_scale: Params


def scale_by_adam8bit(
    b1: float, b2: float, eps: float, axes: Mapping[str, tuple[str | None, ...]]
) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v) + eps), both corrected for their start at 0.

    Args:
        b1, b2, eps: as in Adam.
        axes: names of the trailing axes of each parameter; leading axes count layers, each of
            which has its own blocks.
    """

    def in_8_bits(name: str, param: jax.Array) -> bool:
        is_kernel = len(axes[name]) >= 2 and axes[name][0] != "vocab"
        return is_kernel and math.prod(param.shape[-2:]) >= MIN_SIZE

    def init(params: Params) -> Adam8bitState:
        coded = {name for name, param in params.items() if in_8_bits(name, param)}

        def moments() -> Params:
            return {
                name: jnp.zeros(param.shape, jnp.uint8 if name in coded else jnp.float32)
                for name, param in params.items()
            }

        def scales() -> Params:  # 0: whatever a code stands for, the moment is 0
            return {name: jnp.zeros(scale_shape(params[name].shape)) for name in coded}

        return Adam8bitState(jnp.zeros((), jnp.int32), moments(), moments(), scales(), scales())

    def update(
        grads: Params, state: Adam8bitState, params: Params | None = None
    ) -> tuple[Params, Adam8bitState]:
        updates: Params = {}
        new = Adam8bitState(state.count + 1, {}, {}, {}, {})
        step = new.count.astype(jnp.float32)
        for name, grad in grads.items():
            m, v, coded = state.m[name], state.v[name], name in state.m_scale
            if coded:
                m = dequantize(m, state.m_scale[name], signed=True)
                v = dequantize(v, state.v_scale[name], signed=False)
            m = b1 * m + (1 - b1) * grad
            v = b2 * v + (1 - b2) * jnp.square(grad)
            updates[name] = (m / (1 - b1**step)) / (jnp.sqrt(v / (1 - b2**step)) + eps)
            if coded:
                m, new.m_scale[name] = quantize(m, signed=True)
                v, new.v_scale[name] = quantize(v, signed=False)
            new.m[name], new.v[name] = m, v
        return updates, new

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def quantize(x: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """Float32 [..., D, F] -> uint8 codes [..., D, F] and the blocks' scales [..., G, C]."""
    blocks = _cut(x)
    scale = jnp.max(jnp.abs(blocks), -2)
    normed = blocks * jnp.where(scale > 0, 1 / scale, 0)[..., None, :]
    return _joined(encode(normed, signed=signed), x.shape), scale


def dequantize(codes: jax.Array, scale: jax.Array, *, signed: bool) -> jax.Array:
    """The inverse of `quantize`, but for its rounding."""
    blocks = decode(_cut(codes), signed=signed) * scale[..., None, :]
    return _joined(blocks, codes.shape)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., D, F] -> [..., G, C]: one number for each block.

    G follows D and C follows F, so they are sharded alike.
    """
    *lead, rows, columns = shape
    if rows % BLOCK == 0:
        return (*lead, rows // BLOCK, columns)
    return (*lead, 1, -(-rows * columns // BLOCK))


def _cut(x: jax.Array) -> jax.Array:
    """[..., D, F] -> [..., G, 256, C], padded with zeros."""
    *lead, rows, columns = x.shape
    if rows % BLOCK == 0:
        return x.reshape(*lead, rows // BLOCK, BLOCK, columns)
    flat = jnp.swapaxes(x, -1, -2).reshape(*lead, rows * columns)
    flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, -rows * columns % BLOCK)])
    return jnp.swapaxes(flat.reshape(*lead, 1, -1, BLOCK), -1, -2)


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_cut`."""
    *lead, rows, columns = shape
    if rows % BLOCK == 0:
        return blocks.reshape(shape)
    flat = jnp.swapaxes(blocks, -1, -2).reshape(*lead, -1)[..., : rows * columns]
    return jnp.swapaxes(flat.reshape(*lead, columns, rows), -1, -2)
