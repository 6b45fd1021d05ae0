import numpy as np
import pytest

from jaxtune.data import load, load_tokenizer
from jaxtune.data.batch import TokenRow
from jaxtune.schema import Data


def say(*texts, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, *turns]}


def run(tokenizer, path, **options):
    cfg = Data(train=(path,), shuffle=False, **options)
    return load(cfg, tokenizer, seed=0, vocab_size=300)[0]


def learnt(tokenizer, row: TokenRow) -> str:
    return tokenizer.decode(row.tokens[row.trained])


@pytest.fixture(scope="module")
def raw():
    return load_tokenizer("tiny:llama", template="none")


def test_last_rounds(byte_tokenizer, write_rows):
    row = say("first", "one", "second", "two", "third", "three", system="Be kind.")
    path = write_rows([row, say("q", "a")])
    whole, short = run(byte_tokenizer, path).rows
    lengths = [
        len(
            run(byte_tokenizer, write_rows([say(*texts, system="Be kind.")], "part")).rows[0].tokens
        )
        for texts in (("second", "two", "third", "three"), ("third", "three"))
    ]
    for limit, expected in ((lengths[0], ["two", "three"]), (lengths[0] - 1, ["three"])):
        made = run(byte_tokenizer, path, max_seq_len=limit, overlong="last_rounds")
        assert made.stats.truncated == 1 and made.stats.rows == 2
        text = byte_tokenizer.decode(made.rows[0].tokens)
        assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        answers = learnt(byte_tokenizer, made.rows[0]).split("<|im_end|>")[:-1]
        assert answers == expected and len(made.rows[0].tokens) <= limit
        assert made.rows[1].tokens.tolist() == short.tokens.tolist()


def test_a_last_round_that_does_not_fit(byte_tokenizer, write_rows):
    path = write_rows([say("old", "old", "x" * 200 + "end", "answer", system="s")])
    cut = {"max_seq_len": 120, "max_source_len": 10, "overlong": "last_rounds"}
    (row,) = run(byte_tokenizer, path, **cut).rows
    assert "<|im_start|>user\nxxxxxxxend<|im_end|>" in byte_tokenizer.decode(row.tokens)
    assert learnt(byte_tokenizer, row) == "answer<|im_end|>"
    path = write_rows([say("q", "y" * 300)])
    (row,) = run(byte_tokenizer, path, **cut).rows
    assert len(row.tokens) == 120 and set(learnt(byte_tokenizer, row)) == {"y"}


def test_last_rounds_of_a_template_that_makes_a_row_of_each_answer(write_rows):
    tokenizer = load_tokenizer("tiny:llama", template="qwen3")
    path = write_rows([say("first", "one", "second " * 9, "two", "third", "three")])
    made = run(tokenizer, path, max_seq_len=100, overlong="last_rounds")
    texts = [learnt(tokenizer, row).removeprefix("<think>\n\n</think>\n\n") for row in made.rows]
    assert [text.partition("<")[0] for text in texts] == ["one", "two", "three"]
    assert all(len(row.tokens) <= 100 for row in made.rows) and made.stats.truncated == 2


def test_last_rounds_without_an_answer_to_learn(write_rows):
    tokenizer = load_tokenizer("tiny:llama", template="qwen3")
    row = say("first", "one " * 30, "second " * 9, "two", "third", "three")
    for turn in row["messages"][3:]:
        turn["weight"] = 0
    made = run(tokenizer, write_rows([row, say("q", "a")]), max_seq_len=100, overlong="last_rounds")
    assert (made.stats.rows, made.stats.untrained) == (1, 1)


def test_source_and_target_are_cut_as_in_paddlenlp(raw, write_rows):
    """src loses its beginning, tgt its end; EOS only stands behind a whole tgt."""

    def paddlenlp(src, tgt, src_length, max_length):
        source = raw.encode(src)[-src_length:]
        target = raw.encode(tgt)
        room = max_length - len(source)
        whole = [*target, raw.eos_token_id]
        target = whole if len(whole) <= room else target[:room]
        return [*source, *target], [False] * len(source) + [True] * len(target)

    pairs = [("s" * n, "t" * m) for n in (3, 10, 30) for m in (2, 9, 10, 11, 50)]
    path = write_rows([{"src": src, "tgt": tgt} for src, tgt in pairs])
    options = {"max_seq_len": 20, "max_source_len": 10, "template": "none"}
    made = run(raw, path, overlong="truncate_source", **options)
    assert len(made.rows) == len(pairs)
    for (src, tgt), row in zip(pairs, made.rows, strict=True):
        tokens, trained = paddlenlp(src, tgt, 10, 20)
        assert row.tokens.tolist() == tokens and row.trained.tolist() == trained


def test_texts_are_split(raw, write_rows):
    path = write_rows([{"text": "abcdefghij" * 5}, {"text": "short"}])
    made = run(raw, path, max_seq_len=16, overlong="split")
    assert made.stats.split == 3 and made.stats.rows == 5 and made.stats.truncated == 0
    joined = np.concatenate([row.tokens for row in made.rows])
    assert raw.decode(joined) == "abcdefghij" * 5 + "<|im_end|>short<|im_end|>"
    assert [bool(row.trained[0]) for row in made.rows] == [False] * 5
    assert all(row.trained[1:].all() for row in made.rows)


def test_answers_that_nobody_learns_are_left_out(byte_tokenizer, write_rows):
    marked = say("q", "a")
    marked["messages"][1]["train"] = False
    made = run(byte_tokenizer, write_rows([marked, say("q", "b")]))
    assert made.stats.rows == 1 and made.stats.untrained == 1
    last = run(byte_tokenizer, write_rows([say("q", "a", "r", "b")]), train_on="last")
    assert learnt(byte_tokenizer, last.rows[0]) == "b<|im_end|>"
    made = run(byte_tokenizer, write_rows([marked, say("q", "b")]), train_on="all")
    assert byte_tokenizer.decode(made.rows[0].tokens[~made.rows[0].trained]) == (
        "<|im_start|>a<|im_end|>"
    )
