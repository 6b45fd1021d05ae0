"""Which linear layers are kept quantized, and in which format."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import quant
from jaxtune.errors import ConfigError
from jaxtune.nn.linear import layer_names, linears
from jaxtune.quant import QArray
from jaxtune.tree import matches

# Path of a kernel ("layers.0.attn.q_proj.kernel") -> its shapes and dtypes, quantized.
Kernels = Mapping[str, QArray]


def choose(model: Any, items: Sequence[str], *, block_size: int, double_quant: bool) -> Kernels:
    """Reads `format` and `format=pattern` items; of several that match a layer the first counts.

    A layer is matched by its name with its index in the whole model (`layers.3.attn.q_proj`); the
    output head is never quantized.

    Args:
        model: with arrays or ShapeDtypeStructs.
        items: of `config.quant.format`.
        block_size: rows that share a scale.
        double_quant: quantize the scales of nf4 and fp4.

    Raises:
        ConfigError: a pattern matches nothing, layers of one stack would differ in format, or a
            kernel's shape does not suit its format.
    """
    rules = [tuple(item.partition("=")[::2]) for item in items]
    unused = {rule for rule in rules if rule[1]}
    kernels = {}
    for path, linear in linears(model):
        chosen = set()
        for index, layer in layer_names(path, model.stacks):
            hits = [rule for rule in rules if index is not None and _hits(rule[1], layer)]
            unused -= set(hits[:1])
            chosen.add(hits[0][0] if hits else "")
        if len(chosen) > 1:
            raise ConfigError(
                f"config.quant.format gives the layers of {path} different formats, but they are "
                "stacked in one array - set model.layers=unroll, or patterns without indices"
            )
        if name := chosen.pop():
            quantize = functools.partial(
                quant.quantize,
                format=name,
                block_size=block_size,
                double_quant=double_quant and quant.FORMATS[name].nests,
            )
            try:
                kernels[f"{path}.kernel"] = jax.eval_shape(quantize, linear.kernel.get_value())
            except ValueError as error:
                raise ConfigError(f"config.quant.format={name} for {path}: {error}") from error
    if unused:
        listed = ", ".join(f"{name}={pattern}" for name, pattern in sorted(unused))
        raise ConfigError(f"config.quant.format: {listed} matches no layer that is left")
    return kernels


def _hits(pattern: str, layer: str) -> bool:
    return not pattern or matches(pattern, layer)


def put(model: nnx.Module, kernels: Kernels) -> None:
    """Puts quantized kernels, all zeros, in place of dense ones (for use under `tree.describe`)."""
    for path, linear in linears(model):
        if kernel := kernels.get(f"{path}.kernel"):
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kernel)
            linear.kernel = nnx.Param(zeros, axes=linear.axes)
