"""Rows with labels: their formats, which labels there are, and which tokens carry them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxtune.data import Labelling, Loader, load, load_tokenizer
from jaxtune.data.annotations import classified, extractive, tagged
from jaxtune.data.labelling import ONE, SCORES, SOME, discovered, problem_of
from jaxtune.data.rows import RowError
from jaxtune.errors import ConfigError, DataError
from jaxtune.schema import LABELLED, Data

SEQUENCE, TOKENS, SPANS = LABELLED
WORDS = ("a", "b", "c", "paris", "lives", "in", "ann", "##e", "who", "?", ".")


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A WordPiece tokenizer of a few words, with BERT's special tokens around."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {token: i for i, token in enumerate((*special, *WORDS))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    single, marks = "[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single, pair, marks)
    backend.enable_truncation(4)  # as folders of sentence-transformers have it
    backend.enable_padding(length=16)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    folder = tmp_path_factory.mktemp("bert")
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(str(folder))


def loaded(path: str, tokenizer: Any, labelling: Labelling, **options: Any) -> Any:
    cfg = Data(train=(path,), max_seq_len=options.pop("max_seq_len", 16), cache="", **options)
    return load(cfg, tokenizer, seed=0, vocab_size=100, labelling=labelling)[0]


def test_texts_are_those_of_the_tokenizer_and_labelled_at_one_token(
    bert_tokenizer: Any, write_rows: Callable[..., str]
):
    rows = [
        {"text": "anne lives in paris", "label": "yes"},
        {"sentence1": "who ?", "sentence2": "anne .", "label": "no"},
        {"text": "a " * 40, "label": 1},
    ]
    labelling = Labelling(SEQUENCE, ("no", "yes"))
    made = loaded(write_rows(rows), bert_tokenizer, labelling, format="classified")
    assert made.stats.truncated == 1 and made.stats.trained_tokens == 3
    given: list[Any] = [("anne lives in paris",), ("who ?", "anne ."), ("a " * 40,)]
    for row, texts, label in zip(made.rows, given, (1, 0, 1), strict=True):
        theirs = bert_tokenizer(
            *texts, truncation=True, max_length=16, padding=False, return_token_type_ids=True
        )
        assert row.tokens.tolist() == theirs["input_ids"]
        assert row.types.tolist() == theirs["token_type_ids"]
        assert np.flatnonzero(row.trained).tolist() == [0] and row.labels.tolist() == [[label]]
    at_end = Labelling(SEQUENCE, ("no", "yes"), at_end=True)
    row = loaded(write_rows(rows), bert_tokenizer, at_end, format="classified").rows[0]
    assert np.flatnonzero(row.trained).tolist() == [len(row.tokens) - 1]
    dropped = loaded(write_rows(rows), bert_tokenizer, labelling, overlong="drop")
    assert (dropped.stats.rows, dropped.stats.dropped) == (2, 1)
    with pytest.raises(DataError, match="1 rows are longer than data.max_seq_len=16"):
        loaded(write_rows(rows), bert_tokenizer, labelling, overlong="error")


def test_words_are_labelled_at_their_first_token(
    bert_tokenizer: Any, write_rows: Callable[..., str]
):
    rows = [{"tokens": ["anne", "lives", "in", "paris"], "ner_tags": ["PER", "O", "O", "LOC"]}]
    labelling = Labelling(TOKENS, ("LOC", "O", "PER"))
    row = loaded(write_rows(rows), bert_tokenizer, labelling).rows[0]
    # [CLS] ann ##e lives in paris [SEP]
    assert np.flatnonzero(row.trained).tolist() == [1, 3, 4, 5]
    assert row.labels[:, 0].tolist() == [2, 1, 1, 0]
    cut = loaded(write_rows(rows), bert_tokenizer, labelling, max_seq_len=8)
    assert cut.stats.truncated == 0
    cut = loaded(write_rows([{"tokens": ["a"] * 9, "tags": [1] * 9}]), bert_tokenizer, labelling)
    assert cut.rows[0].labels[:, 0].tolist() == [1] * 9


def test_answers_are_marked_where_they_start_and_end(
    bert_tokenizer: Any, write_rows: Callable[..., str]
):
    question, context = "who lives in paris ?", "a . anne lives in paris"
    answers = [{"text": ["anne lives"], "answer_start": [4]}, {"text": ["paris"]}, {"text": []}]
    answers[1]["answer_start"], answers[2]["answer_start"] = [18], []
    rows = [{"question": question, "context": context, "answers": a} for a in answers]
    made = loaded(write_rows(rows), bert_tokenizer, Labelling(SPANS, ("start", "end")))
    # [CLS] who lives in paris ? [SEP] a . ann ##e lives in paris [SEP]
    marked = [(np.flatnonzero(row.trained).tolist(), row.labels.tolist()) for row in made.rows]
    assert marked == [([9, 11], [[1, 0], [0, 1]]), ([13], [[1, 1]]), ([0], [[1, 1]])]
    short = Data(train=(write_rows(rows[:2]),), max_seq_len=13, cache="")
    labelling = Labelling(SPANS, ("start", "end"))
    made = load(short, bert_tokenizer, seed=0, vocab_size=100, labelling=labelling)[0]
    assert made.stats.truncated == 2 and made.stats.untrained == 1 and len(made.rows) == 1


def test_long_contexts_come_in_the_windows_of_transformers(
    bert_tokenizer: Any, write_rows: Callable[..., str]
):
    question, words = "who lives ?", ["a", "b", "c", "anne", "."] * 5
    context = " ".join(words)
    answers = [
        {"text": ["anne . a", "c"], "answer_start": [context.index("anne", 30), 4]},
        {"text": [], "answer_start": []},
    ]
    rows = [{"question": question, "context": context, "answers": a} for a in answers]
    labelling = Labelling(SPANS, ("start", "end"))
    cut = {"overlong": "split", "window_overlap": 3}
    made = loaded(write_rows(rows), bert_tokenizer, labelling, max_seq_len=14, **cut)
    features = bert_tokenizer(
        question,
        context,
        truncation="only_second",
        padding=False,
        max_length=14,
        stride=3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    count = len(features["input_ids"])
    assert len(made.rows) == 2 * count and made.stats.split == 2 * (count - 1)
    first = answers[0]["answer_start"][0]
    held = 0
    for i, row in enumerate(made.rows):
        assert row.tokens.tolist() == features["input_ids"][i % count]
        inside = features.sequence_ids(i % count)
        assert row.types[-1] == 1 and row.types.sum() == inside.count(1) + 1  # the last [SEP]
        offsets = [
            o if part == 1 else (-1, -1)
            for o, part in zip(features["offset_mapping"][i % count], inside, strict=True)
        ]
        starts = [n for n, (begin, _) in enumerate(offsets) if begin == first]
        ends = [n for n, (_, end) in enumerate(offsets) if end == first + len("anne . a")]
        is_here = i < count and starts and ends
        held += bool(is_here)
        places = np.flatnonzero(row.trained).tolist()
        assert places == ([starts[0], ends[0]] if is_here else [0])
        assert row.labels.tolist() == ([[1, 0], [0, 1]] if is_here else [[1, 1]])
    assert 0 < held < count
    assert made.examples[0].others == ("c",)
    none = loaded(write_rows(rows), bert_tokenizer, labelling, max_seq_len=40, **cut)
    assert len(none.rows) == 2 and none.stats.split == 0
    with pytest.raises(DataError, match="2 longer than data.max_seq_len"):
        loaded(write_rows(rows), bert_tokenizer, labelling, max_seq_len=6, **cut)


def test_batches_hold_labels_beside_their_tokens(
    bert_tokenizer: Any, write_rows: Callable[..., str]
):
    rows = [{"text": "a b", "label": [1.0, 0.0]}, {"text": "c", "label": [0.0, 1.0]}]
    rows += [{"text": "a", "label": ["y"]}, {"text": "b", "label": []}, {"text": "c", "label": [0]}]
    path = write_rows(rows)
    labelling = Labelling(SEQUENCE, ("x", "y"), SOME)
    made = loaded(path, bert_tokenizer, labelling)
    assert [row.labels.tolist()[0] for row in made.rows] == [[1, 0], [0, 1], [0, 1], [0, 0], [1, 0]]
    cfg = Data(train=(path,), max_seq_len=8, shuffle=False, packer="next_fit", prefetch=0)
    batch = next(Loader(made, cfg, 2, 2, 0, (0, 1)).batches())[0]
    # Rows of eight tokens: [a b] and [c] and three of one word fit two at a time.
    assert batch.tokens.shape == (2, 2, 8) and batch.labels.shape == (2, 2, 2, 8)
    assert batch.weights.sum() == 5
    first = batch.labels[0, :, 0]
    assert batch.weights[0, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert first[:, 0].tolist() == [1, 0] and first[:, 4].tolist() == [0, 1]
    assert batch.segment_ids[0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert batch.types.shape == batch.tokens.shape and not batch.labels[1, :, 1].any()


@pytest.mark.parametrize(
    ("labels", "problem", "found"),
    [
        (["b", "a", "b"], "auto", (("a", "b"), ONE)),
        (["10", "9", "1"], "auto", (("1", "9", "10"), ONE)),
        ([0, 2, True], "auto", (("LABEL_0", "LABEL_1", "LABEL_2"), ONE)),
        ([3, 2.5], "auto", (("LABEL_0",), SCORES)),
        ([0.5, 2.0], "auto", (("LABEL_0",), SCORES)),
        ([3, 4], SCORES, (("LABEL_0",), SCORES)),
        ([["b"], ["a", "c"]], "auto", (("a", "b", "c"), SOME)),
        ([[0.0, 1.0, 1.0]], "auto", (("LABEL_0", "LABEL_1", "LABEL_2"), SOME)),
        ([[False, True], [False, False]], "auto", (("LABEL_0", "LABEL_1"), SOME)),
        ([[1.0, 0.0], [0.5, -2.0]], "auto", (("LABEL_0", "LABEL_1"), SCORES)),
        ([[0.5, 1.0]], SCORES, (("LABEL_0", "LABEL_1"), SCORES)),
    ],
)
def test_labels_and_problem_of_rows(
    labels: list[Any], problem: str, found: Any, write_rows: Callable[..., str]
):
    rows = [{"text": "t", "label": label} for label in labels]
    cfg = Data(train=(write_rows(rows),))
    assert discovered(cfg, SEQUENCE, problem) == found
    assert problem != "auto" or problem_of(cfg, SEQUENCE) == found[1]


def test_a_number_is_the_class_of_that_name_or_else_an_index():
    stars = Labelling(SEQUENCE, ("1", "2", "3"))
    assert [stars.class_of(label) for label in (1, "3", 0)] == [0, 2, 0]
    with pytest.raises(RowError, match="is 4, which is none of the 3 labels"):
        stars.class_of(4)


def test_labels_that_do_not_fit_are_bad_rows(bert_tokenizer: Any, write_rows: Callable[..., str]):
    path = write_rows([{"text": "a", "label": "yes"}, {"text": "b", "label": "yea"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: label: is 'yea', which is none of the 2"):
        loaded(path, bert_tokenizer, Labelling(SEQUENCE, ("no", "yes")))
    some = Labelling(SEQUENCE, ("x", "y"), SOME)
    with pytest.raises(RowError, match="a class twice - write 0.0 or 1.0 for each class"):
        some.numbers_of((0, 1, 0))
    assert some.numbers_of(classified({"text": "t", "label": [False, True]}).label).tolist() == [
        0,
        1,
    ]
    with pytest.raises(RowError, match="has a 0.0 or 1.0 for each class"):
        some.numbers_of((0.5, 1.0))
    with pytest.raises(DataError, match="has 1 numbers for 2 labels"):
        path = write_rows([{"text": "a", "label": 3}])
        loaded(path, bert_tokenizer, Labelling(SEQUENCE, ("x", "y"), SCORES))
    with pytest.raises(ConfigError, match="labels of texts cannot be trained on by objective.name"):
        loaded(path, bert_tokenizer, Labelling(TOKENS, ("x", "y")))
    with pytest.raises(ConfigError, match="number their classes from 0 to 5000"):
        rows = [{"text": "t", "label": label} for label in (0, 5000)]
        discovered(Data(train=(write_rows(rows),)), SEQUENCE, "auto")


BAD = [
    (classified, {"text": "t", "label": [None]}, "label[0]", "not null"),
    (tagged, {"tokens": ["a"], "tags": ["x", "y"]}, "tags", "has 2 items, tokens has 1"),
    (tagged, {"words": ["a"], "ner_tags": [0.5]}, "ner_tags[0]", "must be a class"),
    (
        extractive,
        {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [2]}},
        "answers",
        "'b' does not stand at character 2",
    ),
    (extractive, {"question": "q", "context": "abc", "answers": []}, "answers", "an object"),
]


@pytest.mark.parametrize(("convert", "fields", "field", "reason"), BAD)
def test_bad_annotations(convert: Any, fields: dict[str, Any], field: str, reason: str):
    with pytest.raises(RowError) as error:
        convert(fields)
    assert error.value.field == field and reason in error.value.reason
