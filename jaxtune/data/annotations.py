"""Rows that label texts, words or a part of a text.

Layouts are those of GLUE (a text or a pair with `label`), CoNLL (`tokens`, `ner_tags`) and SQuAD
(`context`, `question`, `answers`), as the Hugging Face hub has these data sets.
"""

from typing import Any

from jaxtune.data.examples import Classified, Extractive, Label, Tagged
from jaxtune.data.fields import first_of, items_of, object_of, parsed, required, text_of
from jaxtune.data.rows import RowError, json_name

SINGLE = ("text", "sentence", "review")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"))
LABELS = ("label", "labels")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")


def classified(fields: dict[str, Any]) -> Classified:
    """text, or a pair of texts, and label: a class or score, or a list of them."""
    pair = next((pair for pair in PAIRS if all(name in fields for name in pair)), None)
    texts = tuple(required(fields, name) for name in pair or (first_of(fields, SINGLE),))
    name = first_of(fields, LABELS)
    label = parsed(fields.get(name), name)
    if not isinstance(label, list):
        return Classified(texts, _label(label, name))
    items = (_label(item, f"{name}[{index}]") for index, item in enumerate(label))
    # A list of booleans says of each class whether it is one of the text's.
    bools = [isinstance(item, bool) for item in label]
    items = tuple(float(item) if flag else item for item, flag in zip(items, bools, strict=True))
    return Classified(texts, items)


def _label(value: Any, name: str) -> Label:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int | float):
        raise RowError(name, f"must be a class or a score, not {json_name(value)}")
    return value


def tagged(fields: dict[str, Any]) -> Tagged:
    """tokens or words, and tags (ner_tags ...): a class for each."""
    names = first_of(fields, WORDS), first_of(fields, TAGS)
    words, tags = (items_of(fields, name, "one for each word") for name in names)
    if len(words) != len(tags):
        raise RowError(names[1], f"has {len(tags)} items, {names[0]} has {len(words)}")
    for index, tag in enumerate(tags):
        if isinstance(tag, bool) or not isinstance(tag, str | int):
            raise RowError(f"{names[1]}[{index}]", f"must be a class, not {json_name(tag)}")
    given = (text_of(word, f"{names[0]}[{index}]") for index, word in enumerate(words))
    return Tagged(tuple(given), tuple(tags))


def extractive(fields: dict[str, Any]) -> Extractive:
    """context, question, and answers: {text, answer_start}, the first of which is learnt."""
    question, context = required(fields, "question"), required(fields, "context")
    answers = object_of(parsed(fields.get("answers"), "answers"), "answers")
    texts = items_of(answers, "text", "answers")
    starts = items_of(answers, "answer_start", "numbers of characters")
    if not texts:
        return Extractive(question, context, "", -1)
    answer = text_of(texts[0], "answers.text[0]")
    start = starts[0] if starts else None
    if type(start) is not int or not answer or context[start : start + len(answer)] != answer:
        raise RowError("answers", f"{answer!r} does not stand at character {start} of the context")
    others = (text_of(text, f"answers.text[{i}]") for i, text in enumerate(texts[1:], 1))
    return Extractive(question, context, answer, start, tuple(others))
