"""A checkpoint with a head for labels in place of the head in its files."""

import dataclasses
import re
import zlib
from collections.abc import Container
from typing import Any

import numpy as np
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint.hf import places, stored_shape
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.errors import ConfigError
from jaxtune.models.block import is_encoder_decoder
from jaxtune.models.heads import PATH, PROBLEMS, SPAN, TASKS, Head, Headed, head_of
from jaxtune.nn.params import Policy

# Heads of pretraining and of other tasks, and what pools for them.
_OF_HEADS = re.compile(
    r"(cls|lm_head|classifier|score|qa_outputs|generator_\w+|discriminator_\w+|\w+\.pooler)\..+"
)
_OF_LABELS = ("id2label", "label2id", "problem_type")  # of config.json
_STD = 0.02  # of new matrices: the `initializer_range` of nearly all models


def with_head(checkpoint: Checkpoint, objective: Any, seed: int) -> Checkpoint:
    """The model with the head that an objective needs.

    The head of its files is kept if it tells the same labels apart. Else it is new: normal
    matrices, biases of zero; a pooler is taken from the files where they have one.

    Args:
        checkpoint: the model.
        objective: config.objective, with its labels.
        seed: of a new head.

    Raises:
        ConfigError: the model cannot have this objective, or the labels are unknown.
    """
    if objective.name not in TASKS:
        _require_language_model(checkpoint, objective.name)
        return checkpoint
    stored = head_of(checkpoint.config)
    head = wanted_head(objective, stored)
    if head == stored:
        return checkpoint
    family = models.family(checkpoint.config.get("model_type"))
    config = {k: v for k, v in checkpoint.config.items() if k not in _OF_LABELS}
    config |= head.fields(family)
    if stored is not None and (stored.task, stored.labels) == (head.task, head.labels):
        return dataclasses.replace(checkpoint, config=config)  # another loss of the same head
    headed, model_config = models.read_config(config, checkpoint.name)
    pooler = headed.form.pooler
    new = {
        name: shape
        for name, shape in _shapes(headed, model_config).items()
        if name not in checkpoint.tensors or name.rpartition(".")[0] != pooler
    }
    rows = family.weights(model_config)
    replaced = {row.hf for row in rows if row.ours.startswith("lm_head.")}
    kept = {
        name: info
        for name, info in checkpoint.tensors.items()
        if name.rpartition(".")[0] == pooler
        or (name not in replaced and not _OF_HEADS.fullmatch(name))
    }

    def read(name: str) -> np.ndarray:
        if name not in new:
            return checkpoint.read(name)
        if len(new[name]) == 1:
            return np.zeros(new[name], np.float32)
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return random.normal(0, _STD, new[name]).astype(np.float32)

    float32 = np.dtype(np.float32)
    tensors = kept | {name: TensorInfo(shape, float32) for name, shape in new.items()}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, read=read)


def require_pooler(stored: Checkpoint, family: Any, saved: Container[str]) -> None:
    """Refuses a new pooler that would stay as it was drawn and be missing beside an adapter.

    Args:
        stored: the model as its files have it.
        family: with the head of the run.
        saved: names of the base's parameters that train whole and are kept with the adapter.

    Raises:
        ConfigError: there is such a pooler.
    """
    pooler = family.form.pooler if isinstance(family, Headed) else ""
    if pooler and f"{pooler}.weight" not in stored.tensors and f"{PATH}.pooler.kernel" not in saved:
        raise ConfigError(
            f"{stored.name} has no {pooler}.weight, so the pooler is new, and an adapter does not "
            "hold it - set peft.modules_to_save=pooler and peft.exclude_modules=pooler, or "
            "peft.method=full"
        )


def wanted_head(objective: Any, stored: Head | None) -> Head:
    """The head that config.objective asks for; what it leaves open is that of the stored one.

    Raises:
        ConfigError: neither says of which labels it is.
    """
    if objective.name == "question_answering":
        return Head(objective.name, SPAN)
    if stored is not None and stored.task == objective.name:
        if objective.labels in ((), stored.labels):
            auto = objective.problem_type == "auto"
            problem = stored.problem if auto else objective.problem_type
            return dataclasses.replace(stored, problem=problem)
    if not objective.labels:
        raise ConfigError(
            f"config.objective.labels is empty, and objective.name={objective.name} needs to know "
            "how many there are before it reads data - name them"
        )
    problem = PROBLEMS[0] if objective.problem_type == "auto" else objective.problem_type
    return Head(objective.name, objective.labels, problem)


def _shapes(headed: Headed, model_config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors, by Hugging Face's names."""
    head = tree.describe(lambda: headed.label_head(model_config, Policy(), nnx.Rngs(0)))
    abstract = {f"{PATH}.{name}": leaf for name, leaf in head.abstract().items()}
    found = places(headed.weights(model_config), abstract, ())
    return {name: stored_shape(parts) for name, parts in found.items()}


def _require_language_model(checkpoint: Checkpoint, objective: str) -> None:
    """Raises ConfigError unless the model predicts next tokens, of targets if it reads sources."""
    stored = head_of(checkpoint.config)
    if stored is not None:
        raise ConfigError(
            f"config.objective.name={objective}: {checkpoint.name} has a head for labels - set "
            f"objective.name={stored.task}, or take the model that it was made from"
        )
    model_config = models.read_config(checkpoint.config, checkpoint.name)[1]
    if is_encoder_decoder(model_config) != (objective == "seq2seq"):
        what = "has no encoder that reads sources - set objective.name=sft"
        if objective != "seq2seq":
            what = "reads a source and writes a target - set objective.name=seq2seq"
        raise ConfigError(f"config.objective.name={objective}: {checkpoint.name} {what}")
    if not model_config.causal:
        raise ConfigError(
            f"config.objective.name={objective}: {checkpoint.name} is an encoder, whose tokens see "
            f"later ones, so there is no next token to learn - set objective.name to one of "
            f"{', '.join(TASKS)}"
        )
