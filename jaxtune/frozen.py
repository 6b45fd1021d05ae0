"""How frozen weights are kept: in few bits, or in host memory."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxtune.checkpoint import hf
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.nn import quantized
from jaxtune.quant import QArray
from jaxtune.schema import RunConfig
from jaxtune.sharding.mesh import HOST
from jaxtune.tree import Params, Skeleton


def quantized_kernels(
    config: RunConfig,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    dense: Skeleton,
    stacks: tuple[int, ...],
    trained: set[str],
) -> quantized.Kernels:
    """The frozen kernels that are quantized: those of the files, or as the config says."""
    shapes = dense.abstract()
    kernels = hf.quantized_kernels(checkpoint, weights, shapes, stacks)
    if kernels and config.quant.format:
        raise ConfigError(
            f"config.quant.format={','.join(config.quant.format)}: {checkpoint.name} is quantized "
            "already - leave quant.format empty, or take the dense model"
        )
    if coded := sorted(kernels.keys() & trained):
        raise ConfigError(
            f"config.peft.method={config.peft.method} cannot train the quantized {coded[0]} of "
            f"{checkpoint.name} - use peft.method=lora, or take the dense model"
        )
    chosen = quantized.choose(
        dense.model(shapes),
        config.quant.format,
        block_size=config.quant.block_size,
        double_quant=config.quant.double_quant,
    )
    kernels |= {name: kernel for name, kernel in chosen.items() if name not in trained}
    if chosen and not kernels:
        raise ConfigError(
            f"config.quant.format: peft.method={config.peft.method} trains all layers that it "
            "names, and quantized ones cannot be trained"
        )
    if not kernels and config.checkpoint.merge_base != "dequantized":
        raise ConfigError(
            "config.checkpoint.merge_base would be ignored: the base is not quantized"
        )
    return kernels


def on_host(frozen: Params) -> Params:
    """The matrices of layers among frozen parameters (ShapeDtypeStructs), in host memory.

    Raises:
        ConfigError: one is quantized.
    """
    return {name: _on_host(name, leaf) for name, leaf in frozen.items() if _is_layer_matrix(name)}


def _is_layer_matrix(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".kernel")


def _on_host(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, QArray):
        raise ConfigError(
            f"config.model.offload_frozen: {name} is quantized, and XLA for TPU cannot compute "
            "with bytes in host memory - turn it off"
        )
    where = leaf.sharding.with_memory_kind(HOST)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
