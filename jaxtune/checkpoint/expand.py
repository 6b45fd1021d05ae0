"""A checkpoint with more layers, some of which are copies that add nothing.

It is opened like any other, and so is what is exported from it: a deeper Hugging Face model.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune import models, peft
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.quant import QArray

# Of a zeroed copy: what writes to the residual.
_WRITERS = ("o_proj.kernel", "o_proj.bias", "down_proj.kernel", "down_proj.bias")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


def expanded(
    checkpoint: Checkpoint, weights: Sequence[Weight], origins: Sequence[tuple[int, bool]]
) -> Checkpoint:
    """The checkpoint with its layers arranged anew.

    Args:
        checkpoint: the base.
        weights: the family's table.
        origins: of each layer of the result, the base's layer and whether it is a copy whose
            output matrices and biases are zero. Copies are never quantized.
    """
    prefix = next(row.hf.partition("{}")[0] for row in weights if "{}" in row.hf)
    copies = [layer for layer, (_, is_copy) in enumerate(origins) if is_copy]
    writers = [row for row in weights if row.ours.endswith(_WRITERS)]
    zeroed = {name for row in writers for layer in copies for name in row.names(layer)}
    sources: dict[str, str] = {}
    copied: set[str] = set()
    for name in checkpoint.tensors:
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(.+)", name)
        if match is None:
            sources[name] = name
            continue
        for layer, (origin, is_copy) in enumerate(origins):
            if origin == int(match[1]):
                new = f"{prefix}{layer}.{match[2]}"
                sources[new] = name
                copied |= {new} if is_copy else set()

    def read(name: str) -> np.ndarray:
        array = checkpoint.read(sources[name])
        return np.zeros_like(array) if name in zeroed else array

    def read_quantized(name: str) -> QArray:
        assert checkpoint.read_quantized is not None
        return checkpoint.read_quantized(sources[name])

    config = dict(checkpoint.config)
    config |= {key: len(origins) for key in _DEPTHS if key in config}
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][origin] for origin, _ in origins]
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors={new: checkpoint.tensors[old] for new, old in sources.items()},
        read=read,
        quantized={
            new: checkpoint.quantized[old]
            for new, old in sources.items()
            if old in checkpoint.quantized and new not in copied
        },
        read_quantized=read_quantized,
    )


def deeper(config: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the layers that a method adds.

    Args:
        config: config.peft.
        checkpoint: the base.

    Raises:
        ConfigError: what the base's layers do depends on their number.
    """
    family, model_config = models.read_config(checkpoint.config, checkpoint.name)
    origins = peft.origins(config, model_config.num_layers)
    if not origins:
        return checkpoint
    grown = expanded(checkpoint, family.weights(model_config), origins)
    kinds = models.read_config(grown.config, checkpoint.name)[1].layer_kinds
    if kinds and list(kinds) != [model_config.layer_kinds[layer] for layer, _ in origins]:
        raise ConfigError(
            f"config.peft.method={config.method}: what the layers of {checkpoint.name} do follows "
            "from their number, so new ones would change the others - use another method"
        )
    return grown
