"""Experts in four-bit floats with a power of two for every 32 (OCP Microscaling, mxfp4).

gpt-oss is published so. A tensor [E, D, F] is two: `<name>_blocks` uint8 [E, F, D / 32, 16], each
byte two numbers of the last axis, the low half first, and `<name>_scales` uint8 [E, F, D / 32], the
exponents. They are decoded when they are read.

Source: transformers 5.23 (integrations/mxfp4.py).
"""

import dataclasses

import ml_dtypes
import numpy as np

from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.errors import WeightError

_BLOCKS, _SCALES = "_blocks", "_scales"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the decoded tensors in place of their parts, bfloat16.

    Raises:
        WeightError: blocks without scales, or with others than they need (all named at once).
    """
    stored = checkpoint.tensors
    coded = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    tensors = {name: info for name, info in stored.items() if not name.endswith((_BLOCKS, _SCALES))}
    for name in coded:
        *lead, groups, half = stored[name + _BLOCKS].shape
        scales = stored.get(name + _SCALES)
        if scales is None or scales.shape != (*lead, groups) or half != 16 or len(lead) != 2:
            raise WeightError(
                f"{checkpoint.name}: {name}{_BLOCKS} {[*lead, groups, half]} has no scales that "
                "fit - download the model again"
            )
        tensors[name] = TensorInfo((lead[0], 32 * groups, lead[1]), _BFLOAT16)

    def read(name: str) -> np.ndarray:
        if name not in coded:
            return checkpoint.read(name)
        return decoded(checkpoint.read(name + _BLOCKS), checkpoint.read(name + _SCALES))

    config = {key: x for key, x in checkpoint.config.items() if key != "quantization_config"}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, read=read)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [E, D, F] of blocks [E, F, D / 32, 16] and scales [E, F, D / 32], one expert at a
    time."""
    experts, columns, groups, _ = blocks.shape
    result = np.empty((experts, 32 * groups, columns), _BFLOAT16)
    for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):
        pairs = np.stack([_NUMBERS[codes & 15], _NUMBERS[codes >> 4]], axis=-1)
        factors = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        values = pairs.reshape(columns, groups, 32) * factors[..., None]
        result[expert] = values.reshape(columns, -1).T.astype(_BFLOAT16)
    return result
