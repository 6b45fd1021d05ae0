"""Which labels a run has: those that its config names, of its model's head, or of its rows."""

import dataclasses

from jaxtune.checkpoint.label_head import wanted_head
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data import Labelling, labelling
from jaxtune.log import warn
from jaxtune.models import read_config
from jaxtune.models.heads import head_of
from jaxtune.schema import RunConfig


def with_labels(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The config with labels and problem_type as the run has them.

    Args:
        config: of the run.
        checkpoint: the model, whose head may say both.

    Raises:
        DataError: no training row has a label.
    """
    asked = config.objective
    if not asked.is_labelled or asked.name == "question_answering":
        return config
    labels, problem = asked.labels, asked.problem_type
    stored = head_of(checkpoint.config)
    if stored is not None and stored.task == asked.name and labels in ((), stored.labels):
        head = wanted_head(asked, stored)
        labels, problem = head.labels, head.problem
    elif not labels:
        labels, problem = labelling.discovered(config.data, asked.name, problem)
    elif problem == "auto":
        problem = labelling.problem_of(config.data, asked.name)
    if asked.name == "token_classification":
        problem = "auto"  # it has one only
    if stored is not None and (stored.task, stored.labels) != (asked.name, labels):
        warn(
            f"{checkpoint.name} has a head for {stored.task} of {len(stored.labels)} labels, which "
            f"are not the {len(labels)} of objective.name={asked.name} in this order: a new one is "
            "drawn in its place"
        )
    chosen = dataclasses.replace(asked, labels=labels, problem_type=problem)
    return dataclasses.replace(config, objective=chosen)


def labelling_of(checkpoint: Checkpoint) -> Labelling | None:
    """How rows for a model are labelled; None: they are conversations or texts.

    A text is labelled at its last token where only that one has seen all of it.

    Args:
        checkpoint: with the head that the objective needs.
    """
    head = head_of(checkpoint.config)
    if head is None:
        return None
    causal = read_config(checkpoint.config, checkpoint.name)[1].causal
    return Labelling(head.task, head.labels, head.problem, at_end=causal)
