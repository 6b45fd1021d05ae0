"""Checkpoints with more tokens, or with a head of their own."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.errors import WeightError
from jaxtune.models.base import Weight

_TABLES = ("embed.table", "lm_head.kernel", "lm_head.bias")
_FIELDS = ("vocab_size", "padded_vocab_size")


def with_vocabulary(checkpoint: Checkpoint, weights: Sequence[Weight], size: int) -> Checkpoint:
    """The same model with more embeddings and, untied, more rows of the head.

    A new row is the mean of the old ones, in float32: then the new tokens together get at most as
    much probability as they would among average ones (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models").

    Args:
        checkpoint: the model.
        weights: its family's table.
        size: rows wanted.

    Raises:
        WeightError: the model has more rows already, or is quantized there.
    """
    names = {row.hf for row in weights if row.ours in _TABLES} & set(checkpoint.tensors)
    old = {checkpoint.tensors[name].shape[0] for name in names}
    if len(old) != 1 or size < max(old) or names & set(checkpoint.quantized):
        raise WeightError(
            f"{checkpoint.name}: {sorted(old)} rows of its vocabulary cannot become {size} - use "
            "as many or more, and a model whose embeddings are not quantized"
        )
    extra = size - old.pop()

    def read(name: str) -> np.ndarray:
        array = checkpoint.read(name)
        if name not in names:
            return array
        mean = array.astype(np.float32).mean(axis=0).astype(array.dtype)
        return np.concatenate([array, np.broadcast_to(mean, (extra, *mean.shape))])

    tensors = {
        name: TensorInfo((size, *info.shape[1:]), info.dtype) if name in names else info
        for name, info in checkpoint.tensors.items()
    }
    changed = {field: size for field in _FIELDS if field in checkpoint.config}
    config = checkpoint.config | changed
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, read=read)


def untied(checkpoint: Checkpoint, weights: Sequence[Weight]) -> Checkpoint:
    """The same model whose head is a copy of the embedding, instead of the embedding.

    Args:
        checkpoint: a model whose head is tied.
        weights: its family's table.
    """
    by_path = {row.ours: row.hf for row in weights}
    head, table = by_path["lm_head.kernel"], by_path["embed.table"]
    tensors = {**checkpoint.tensors, head: checkpoint.tensors[table]}
    config = checkpoint.config | {"tie_word_embeddings": False}

    def read(name: str) -> np.ndarray:
        return checkpoint.read(table if name == head else name)

    return dataclasses.replace(checkpoint, config=config, tensors=tensors, read=read)
