"""What a model may have in place of a language model's head: one that labels texts or tokens.

`architectures` of config.json says which (`BertForSequenceClassification`), `id2label` what it
tells apart. Encoders name the layers of their heads in `HEADS`; decoders have `score`, which is
read at the last token of a text.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.models.tables import linear
from jaxtune.nn.label_head import HeadConfig, LabelHead
from jaxtune.nn.params import Policy

PATH = "classifier"  # of the head among our parameters
TRAINED = (f"{PATH}.out.", f"{PATH}.dense.")  # how the names begin of those that are new


class Task(NamedTuple):
    """What others call a task: how names of transformers' classes end, and PEFT's task_type."""

    suffix: str
    peft: str


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sequence_classification": Task("ForSequenceClassification", "SEQ_CLS"),
        "token_classification": Task("ForTokenClassification", "TOKEN_CLS"),
        "question_answering": Task("ForQuestionAnswering", "QUESTION_ANS"),
    }
)
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
SPAN = ("start", "end")  # what the head of question_answering scores every token as


class Form(NamedTuple):
    """How a family's head is built, by the names of its layers in Hugging Face's files.

    Attributes:
        out: the layer that gives the logits.
        bias: whether it has one.
        dense: a layer before it that belongs to the head.
        pooler: a layer before it that belongs to the pretrained model.
        activation: what follows either.
    """

    out: str
    bias: bool = True
    dense: str = ""
    pooler: str = ""
    activation: str = "tanh"


TOKEN_FORMS: Mapping[str, Form] = MappingProxyType(
    {"token_classification": Form("classifier"), "question_answering": Form("qa_outputs")}
)
_OF_DECODERS = MappingProxyType({"sequence_classification": Form("score", bias=False)})


@dataclass(frozen=True)
class Head:
    """What a head tells apart.

    Attributes:
        task: a name of `TASKS`.
        labels: names of its outputs.
        problem: of sequence_classification, one of `PROBLEMS`; of the others the first.
    """

    task: str
    labels: tuple[str, ...]
    problem: str = PROBLEMS[0]

    @property
    def columns(self) -> int:
        """Numbers that a labelled token is labelled with: its class, or one for each output."""
        is_class = self.task != "question_answering" and self.problem == PROBLEMS[0]
        return 1 if is_class else len(self.labels)

    def fields(self, family: Any) -> dict[str, Any]:
        """What config.json says of the head."""
        base = family.TINY["architectures"][0]
        for ending in ("ForCausalLM", "LMHeadModel", "Model"):
            base = base.removesuffix(ending)
        found: dict[str, Any] = {"architectures": [base + TASKS[self.task].suffix]}
        if self.task == "question_answering":
            return found
        found["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
        found["label2id"] = {label: i for i, label in enumerate(self.labels)}
        if self.task == "sequence_classification":
            found["problem_type"] = self.problem
        return found


def head_of(hf: Mapping[str, Any]) -> Head | None:
    """The head that config.json describes; None: that of a language model, or none.

    Without `problem_type` a single output is a score and several are classes, as in transformers,
    where the type of the labels may also say that a text has several of them.
    """
    name = (hf.get("architectures") or [""])[0]
    task = next((task for task, row in TASKS.items() if name.endswith(row.suffix)), None)
    if task is None:
        return None
    if task == "question_answering":
        return Head(task, SPAN)
    named = hf.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    labels = tuple(str(named[key]) for key in sorted(named, key=int))
    if task == "token_classification":
        return Head(task, labels)
    single = "regression" if len(labels) == 1 else PROBLEMS[0]
    return Head(task, labels, hf.get("problem_type") or single)


@dataclass(frozen=True)
class Headed:
    """A family with another head, in place of the family's module.

    Attributes:
        family: its module.
        form: how the head is built.
        head: what it tells apart.
    """

    family: Any
    form: Form
    head: Head

    def weights(self, config: Any) -> tuple[Weight, ...]:
        """The family's table, with the head's rows in place of a language model's."""
        rows = (row for row in self.family.weights(config) if not row.ours.startswith("lm_head."))
        form = self.form
        names = {"out": form.out, "dense": form.dense, "pooler": form.pooler}
        own = (linear(f"{PATH}.{ours}", hf) for ours, hf in names.items() if hf)
        return (*rows, *(row for pair in own for row in pair))

    def label_head(self, config: Any, policy: Policy, rngs: nnx.Rngs) -> LabelHead:
        """The head itself."""
        form = self.form
        shape = HeadConfig(
            width=config.hidden_size,
            outputs=len(self.head.labels),
            bias=form.bias,
            pooler=bool(form.pooler),
            dense=bool(form.dense),
            activation=form.activation,
            problem=self.head.problem,
        )
        return LabelHead(shape, policy, rngs)

    def build(self, config: Any, policy: Policy, rngs: nnx.Rngs) -> nnx.Module:
        """The family's model with the head as `classifier`."""
        model = self.family.build(config, policy, rngs)
        model.lm_head = nnx.data(None)
        model.classifier = self.label_head(config, policy, rngs)
        return model


def headed(family: Any, config: Any, head: Head) -> tuple[Headed, Any]:
    """The family and its config with a head for labels.

    Raises:
        ConfigError: the family has no such head.
    """
    forms = getattr(family, "HEADS", _OF_DECODERS)
    if head.task not in forms:
        name = family.TINY["model_type"]
        raise ConfigError(
            f"objective.name={head.task} is not supported for {name} - use a model that sees both "
            "ways and writes nothing (bert, roberta, electra)"
        )
    if not config.causal:
        return Headed(family, forms[head.task], head), config
    config = dataclasses.replace(config, tie_embeddings=False, head_bias=False)
    return Headed(family, forms[head.task], head), config


def label_logits(model: Any, batch: Any) -> jax.Array:
    """What the head says of every token, float32 [B, T, outputs].

    Args:
        model: with a head for labels.
        batch: TokenBatch of [B, T] arrays.
    """
    given = (batch.tokens, batch.positions, batch.segment_ids)
    if model.config.causal:
        return model.classifier(model.hidden(*given)[0])
    return model.classifier(model.hidden(*given, batch.types))
