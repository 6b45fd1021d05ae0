"""Adam with 8-bit moments.

Dettmers et al. 2022, arXiv 2110.02861, as bitsandbytes 0.50.2's `AdamW8bit`: blocks of 256 numbers
share a scale, their largest absolute value; parameters of fewer than 4096 elements keep float32
moments. bitsandbytes' blocks run along the rows of Hugging Face's layout, in which kernels are
transposed: here they run down the columns. Where 256 divides a column they are cut out of it in
place, which costs no copy on a TPU and lets either axis be sharded; other shapes are flattened.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.optim.dynamic import decode, encode
from jaxtune.tree import Params

BLOCK = 256
MIN_SIZE = 4096
Axes = tuple[str | None, ...]


class Adam8bitState(NamedTuple):
    """Both moments.

    Attributes:
        count: int32, applied steps.
        m, v: uint8 codes in the parameter's shape; float32 for small parameters.
        m_scale, v_scale: float32 scales of the blocks, of the parameter's rank; only for codes.
    """

    count: jax.Array
    m: Params
    v: Params
    m_scale: Params
    v_scale: Params


def scale_by_adam8bit(
    b1: float, b2: float, eps: float, axes: Mapping[str, Axes]
) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v) + eps), both corrected for their start at 0.

    The direction is made of the new moments before they are rounded.

    Args:
        b1, b2, eps: as in Adam.
        axes: names of the trailing axes of each parameter; leading axes count layers, each of
            which has its own blocks and its own size.
    """

    def init(params: Params) -> Adam8bitState:
        large = {n: p for n, p in params.items() if _is_large(p.shape, axes[n])}

        def moments() -> Params:
            return {
                n: jnp.zeros(p.shape, jnp.uint8 if n in large else jnp.float32)
                for n, p in params.items()
            }

        def scales() -> Params:  # 0, so it does not matter what a code stands for
            return {n: jnp.zeros(Blocks.of(p.shape, axes[n]).scale_shape) for n, p in large.items()}

        return Adam8bitState(jnp.zeros((), jnp.int32), moments(), moments(), scales(), scales())

    def update(
        grads: Params, state: Adam8bitState, params: Params | None = None
    ) -> tuple[Params, Adam8bitState]:
        count = optax.safe_increment(state.count)
        step = count.astype(jnp.float32)
        updates: Params = {}
        new = Adam8bitState(count, {}, {}, {}, {})
        for name, grad in grads.items():
            m, v, blocks = state.m[name], state.v[name], Blocks.of(grad.shape, axes[name])
            large = name in state.m_scale
            if large:
                m = blocks.dequantize(m, state.m_scale[name], signed=True)
                v = blocks.dequantize(v, state.v_scale[name], signed=False)
            m = b1 * m + (1 - b1) * grad
            v = b2 * v + (1 - b2) * jnp.square(grad)
            updates[name] = (m / (1 - b1**step)) / (jnp.sqrt(v / (1 - b2**step)) + eps)
            if large:
                m, new.m_scale[name] = blocks.quantize(m, signed=True)
                v, new.v_scale[name] = blocks.quantize(v, signed=False)
            new.m[name], new.v[name] = m, v
        return updates, new

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _is_large(shape: tuple[int, ...], axes: Axes) -> bool:
    return math.prod(shape[len(shape) - len(axes) :]) >= MIN_SIZE


@dataclass(frozen=True)
class Blocks:
    """How an array is cut into blocks.

    Attributes:
        shape: of the array.
        axis: the axis along which blocks are cut out in place; None: the array is flattened.
        rank: trailing axes of one layer's array, at most two.
        down: whether Hugging Face's layout is the transpose.
    """

    shape: tuple[int, ...]
    axis: int | None
    rank: int
    down: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: Axes) -> "Blocks":
        """The blocks of a parameter whose trailing axes are named `axes`."""
        down = len(axes) >= 2 and axes[0] != "vocab"
        axis = len(shape) - 1 - down
        in_place = shape[axis] % BLOCK == 0
        return cls(shape, axis if in_place else None, min(len(axes), 2), down)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One number for each block, with as many axes as the array has.

        The axis of blocks has the place of the axis that they divide, so it is sharded alike. Of a
        flattened array that is the outer axis of Hugging Face's layout.
        """
        if self.axis is not None:
            return tuple(n // BLOCK if i == self.axis else n for i, n in enumerate(self.shape))
        lead = self.shape[: -self.rank]
        blocks = -(-math.prod(self.shape[-self.rank :]) // BLOCK)
        ones = (1,) * (self.rank - 1)
        return (*lead, *ones, blocks) if self.down else (*lead, blocks, *ones)

    @property
    def block_axis(self) -> int:
        """Where `cut` puts the numbers of a block."""
        return len(self.shape) - self.rank + 1 if self.axis is None else self.axis + 1

    def cut(self, x: jax.Array) -> jax.Array:
        """The array with an axis of 256 numbers that share a scale."""
        if self.axis is not None:
            i = self.axis
            return x.reshape(*self.shape[:i], -1, BLOCK, *self.shape[i + 1 :])
        lead = self.shape[: -self.rank]
        flat = (jnp.swapaxes(x, -1, -2) if self.down else x).reshape(*lead, -1)
        missing = -flat.shape[-1] % BLOCK
        flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, missing)])
        return flat.reshape(*lead, -1, BLOCK)

    def join(self, blocks: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        if self.axis is not None:
            return blocks.reshape(self.shape)
        lead, layer = self.shape[: -self.rank], self.shape[-self.rank :]
        flat = blocks.reshape(*lead, -1)[..., : math.prod(layer)]
        if self.down:
            return jnp.swapaxes(flat.reshape(*lead, *layer[::-1]), -1, -2)
        return flat.reshape(self.shape)

    def quantize(self, x: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
        """Codes in the shape of x, and the blocks' scales."""
        blocks = self.cut(x)
        scale = jnp.max(jnp.abs(blocks), self.block_axis, keepdims=True)
        codes = encode(blocks * jnp.where(scale > 0, 1 / scale, 0), signed=signed)
        return self.join(codes), scale.reshape(self.scale_shape)

    def dequantize(self, codes: jax.Array, scale: jax.Array, *, signed: bool) -> jax.Array:
        """The numbers that `quantize` rounded, float32."""
        blocks = decode(self.cut(codes), signed=signed)
        shape = blocks.shape[: self.block_axis] + (1,) + blocks.shape[self.block_axis + 1 :]
        return self.join(blocks * scale.reshape(shape))
