"""Small networks that make the parameters of a prompt while it is trained.

What they give is a table, which is all that is needed afterwards. They are computed in float32.
Weights start as torch's: uniform in +-1 / sqrt(inputs), of an LSTM +-1 / sqrt(hidden size), but
biases at zero; an LSTM has one bias where torch keeps two that are only ever added.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.nn.params import AdapterParam

Axes = tuple[str | None, str | None]


class Dense(nnx.Module):
    """x W + b: [..., D_in] -> [..., D_out]; leading axes of the weight are of several layers."""

    def __init__(self, shape: tuple[int, ...], axes: Axes):
        *stack, _, d_out = shape
        self.kernel = AdapterParam(jnp.zeros(shape), axes=axes)
        self.bias = AdapterParam(jnp.zeros((*stack, d_out)), axes=axes[-1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel.get_value(), precision="highest")
        return y + self.bias.get_value()[..., None, :]


class Direction(nnx.Module):
    """An LSTM over [P, D_in] in one direction (Hochreiter and Schmidhuber 1997), [P, h].

    Gates are in torch's order: input, forget, cell, output.
    """

    def __init__(self, d_in: int, hidden: int):
        self.inputs = AdapterParam(jnp.zeros((d_in, 4 * hidden)), axes=(None, None))
        self.recurrent = AdapterParam(jnp.zeros((hidden, 4 * hidden)), axes=(None, None))
        self.gate_bias = AdapterParam(jnp.zeros((4 * hidden,)), axes=(None,))

    def __call__(self, x: jax.Array, *, reverse: bool) -> jax.Array:
        recurrent = self.recurrent.get_value()
        x = jnp.matmul(x, self.inputs.get_value(), precision="highest")
        x = x + self.gate_bias.get_value()

        def step(carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(x + jnp.matmul(h, recurrent, precision="highest"), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros(recurrent.shape[0])
        return jax.lax.scan(step, (zeros, zeros), x, reverse=reverse)[1]


class BiLSTM(nnx.Module):
    """[P, D_in] -> [P, 2 h]: each layer reads both directions of the one before it."""

    def __init__(self, d_in: int, hidden: int, num_layers: int):
        sizes = [d_in] + [2 * hidden] * (num_layers - 1)
        self.forward = nnx.List([Direction(size, hidden) for size in sizes])
        self.backward = nnx.List([Direction(size, hidden) for size in sizes])

    def __call__(self, x: jax.Array) -> jax.Array:
        for ahead, back in zip(self.forward, self.backward, strict=True):
            x = jnp.concatenate([ahead(x, reverse=False), back(x, reverse=True)], axis=-1)
        return x


def initial(leaf: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """First value of a variable of these networks, float32, by the last part of its name."""
    if leaf == "bias":
        return np.zeros(shape, np.float32)
    bound = (shape[-2] if leaf == "kernel" else shape[-1] // 4) ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)
