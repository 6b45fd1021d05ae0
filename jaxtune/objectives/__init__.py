"""What is minimised: functions of a model and a batch that return a sum, a weight and metrics.

Sums, never means: the step divides once, after all micro-batches and devices have been added up, so
packing, accumulation and data parallelism change nothing.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax

from jaxtune.objectives.classification import classification
from jaxtune.objectives.question_answering import question_answering
from jaxtune.objectives.seq2seq import seq2seq
from jaxtune.objectives.sft import sft

# (model, batch) -> the sum, and other sums by name
Objective = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]

OBJECTIVES = MappingProxyType(
    {
        "sft": sft,
        "sequence_classification": classification,
        "token_classification": classification,
        "question_answering": question_answering,
        "seq2seq": seq2seq,
    }
)
