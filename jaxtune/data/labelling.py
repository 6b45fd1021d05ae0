"""What rows are labelled with: which classes there are, and what a row's labels are as numbers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.data.examples import Classified, Extractive, Label, Labelled, Tagged
from jaxtune.data.records import read_examples, sources_of
from jaxtune.data.rows import BadRow, RowError
from jaxtune.errors import ConfigError, DataError, nearest
from jaxtune.schema import Data

KINDS: dict[str, type] = {
    "sequence_classification": Classified,
    "token_classification": Tagged,
    "question_answering": Extractive,
}
ONE, SOME, SCORES = "single_label_classification", "multi_label_classification", "regression"


@dataclass(frozen=True)
class Labelling:
    """How rows of an objective are labelled.

    Attributes:
        objective: its name, a key of `KINDS`.
        names: the classes, or what the scores are of, in the order of the head's outputs.
        problem: of sequence_classification, how they go with a text: ONE, SOME or SCORES.
        at_end: whether a text is labelled at its last token instead of its first.
    """

    objective: str
    names: tuple[str, ...]
    problem: str = ONE
    at_end: bool = False

    @property
    def columns(self) -> int:
        """Numbers of a labelled token."""
        if self.objective == "question_answering":
            return 2
        return 1 if self.problem == ONE else len(self.names)

    def class_of(self, label: Label) -> int:
        """The number of a class that a row names, or numbers itself; names go before numbers.

        Raises:
            RowError: there is no such class.
        """
        if str(label) in self.names:
            return self.names.index(str(label))
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        raise RowError(
            "label",
            f"is {label!r}, which is none of the {len(self.names)} labels"
            + nearest(label, self.names),
        )

    def numbers_of(self, label: Label | tuple[Label, ...]) -> np.ndarray:
        """A text's label, float32 [C].

        Raises:
            RowError: it is not what the problem asks for.
        """
        items = label if isinstance(label, tuple) else (label,)
        if self.problem == ONE:
            if isinstance(label, tuple):
                raise RowError("label", f"is a list, and problem_type={ONE} has one class a text")
            return np.array([self.class_of(label)], np.float32)
        if self.problem == SOME and not any(isinstance(item, float) for item in items):
            classes = [self.class_of(item) for item in items]
            if len(set(classes)) < len(classes):
                raise RowError(
                    "label",
                    f"is {label!r}, which has a class twice - write 0.0 or 1.0 for each class",
                )
            chosen = np.zeros(len(self.names), np.float32)
            chosen[classes] = 1
            return chosen
        if len(items) != len(self.names):
            raise RowError("label", f"has {len(items)} numbers for {len(self.names)} labels")
        try:
            numbers = np.array([float(item) for item in items], np.float32)
        except ValueError as error:
            raise RowError("label", f"is {label!r}, which is no number") from error
        if not np.isfinite(numbers).all():
            raise RowError("label", f"is {label!r}, which is not finite")
        if self.problem == SOME and not np.isin(numbers, (0, 1)).all():
            raise RowError(
                "label", f"is {label!r}, and problem_type={SOME} has a 0.0 or 1.0 for each class"
            )
        return numbers


def discovered(cfg: Data, objective: str, problem: str) -> tuple[tuple[str, ...], str]:
    """The labels of the training rows, and the problem that they pose.

    Names of classes are sorted as texts, or as numbers if all are of digits. Rows that have numbers
    instead number the classes, which are then called LABEL_0, LABEL_1 ... as in transformers, and
    so are outputs without names.

    Args:
        cfg: the data section of the config.
        objective: its name, a key of `KINDS` with labels.
        problem: ONE, SOME, SCORES, or "auto": SCORES if any row has a float, but for lists of 0.0
            and 1.0; else SOME if any has a list.

    Raises:
        DataError: as `dataset.load`, or there is no label.
    """
    found: dict[Label, None] = {}
    width, kinds = 1, set()
    for row in read_examples(sources_of(cfg, "train"), cfg, KINDS[objective]):
        if isinstance(row, BadRow):  # counted, and reported, when rows are tokenized
            continue
        items, kind = _labels_of(row)
        kinds.add(kind)
        width = max(width, len(items))
        found.update(dict.fromkeys(items))
    if not found:
        names = ", ".join(cfg.train)
        raise DataError(f"{names}: no usable row has a label - check the files and data.format")
    if problem == "auto":
        problem = _posed(kinds)
    if problem == SCORES or all(isinstance(label, float) for label in found):
        return _numbered(width), problem
    return _names(list(found)), problem


def problem_of(cfg: Data, objective: str) -> str:
    """The problem that the training rows pose (see `discovered`)."""
    rows = read_examples(sources_of(cfg, "train"), cfg, KINDS[objective])
    return _posed({_labels_of(row)[1] for row in rows if not isinstance(row, BadRow)})


def _posed(kinds: Collection[str]) -> str:
    """The problem of rows that pose these; one class if there are none."""
    return max(kinds, key=(ONE, SOME, SCORES).index, default=ONE)


def _labels_of(row: Labelled) -> tuple[tuple[Label, ...], str]:
    """A row's labels, and what problem they pose."""
    if isinstance(row, Tagged):
        return row.tags, ONE
    assert isinstance(row, Classified)
    if isinstance(row.label, tuple):
        are_scores = any(isinstance(item, float) and item not in (0, 1) for item in row.label)
        return row.label, SCORES if are_scores else SOME
    return (row.label,), SCORES if isinstance(row.label, float) else ONE


def _names(labels: Sequence[Label]) -> tuple[str, ...]:
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) < len(labels):
        names = {str(label) for label in labels}
        return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else None))
    if min(numbers) < 0 or max(numbers) > 10 * len(numbers) + 10:
        raise ConfigError(
            f"config.objective.labels: the rows number their classes from {min(numbers)} to "
            f"{max(numbers)} - name the classes, or number them from 0 on"
        )
    return _numbered(max(numbers) + 1)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))
