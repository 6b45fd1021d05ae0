import numpy as np
import pytest

from jaxtune.data import load, load_tokenizer
from jaxtune.errors import ConfigError, DataError, WeightError
from jaxtune.schema import Data


def alpaca(index, answer=None):
    return {"instruction": f"question {index}", "output": answer or f"answer {index}"}


def run(tokenizer, train, vocab_size=259, seed=0, **options):
    paths = (train,) if isinstance(train, str) else tuple(train)
    options = {"max_seq_len": 512, **options}
    return load(Data(train=paths, **options), tokenizer, seed=seed, vocab_size=vocab_size)


def test_load_counts_everything(byte_tokenizer, write_rows):
    rows = [alpaca(0), alpaca(1, "x" * 600), {**alpaca(2), "output": "  "}, alpaca(3)]
    path = write_rows([*rows, b"{oops"])
    dataset, held_out = run(
        byte_tokenizer, path, on_bad_row="skip", max_bad_fraction=0.2, overlong="drop"
    )
    assert held_out is None
    stats = dataset.stats
    assert (stats.records, stats.bad, stats.rows) == (5, 1, 2)
    assert (stats.dropped, stats.untrained, stats.truncated, stats.unended) == (1, 1, 0, 0)
    assert stats.tokens == sum(len(row.tokens) for row in dataset.rows)
    assert stats.trained_tokens == 2 * len("answer 0") + 2
    assert stats.longest == max(len(row.tokens) for row in dataset.rows)
    assert [e.messages[-1].content for e in dataset.examples] == ["answer 0", "answer 3"]
    assert str(stats).endswith(
        "1 bad rows skipped; 1 too long, dropped; 1 without anything to learn, dropped"
    )


def test_formats_are_recognised_for_each_file(byte_tokenizer, write_rows):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    paths = [
        write_rows([alpaca(0)], "a.jsonl"),
        write_rows([{"messages": messages}], "b.jsonl"),
    ]
    assert run(byte_tokenizer, paths)[0].stats.rows == 2
    with pytest.raises(DataError, match="b.jsonl:1: instruction: is missing"):
        run(byte_tokenizer, paths, format="alpaca")
    with pytest.raises(DataError, match="no format fits a row with question"):
        run(byte_tokenizer, write_rows([{"question": 1}]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation(byte_tokenizer, write_rows, side):
    path = write_rows([alpaca(0), alpaca(1, "y" * 40)])
    whole = run(byte_tokenizer, path)[0].rows
    limit = len(whole[0].tokens)
    dataset, _ = run(byte_tokenizer, path, max_seq_len=limit, overlong=f"truncate_{side}")
    assert dataset.stats.truncated == 1 and dataset.stats.unended == 0
    cut = slice(None, limit) if side == "right" else slice(-limit, None)
    assert dataset.rows[1].tokens.tolist() == whole[1].tokens[cut].tolist()
    assert dataset.rows[1].trained[1:].tolist() == whole[1].trained[cut][1:].tolist()
    assert not dataset.rows[1].trained[0] and dataset.rows[1].trained.any()


def test_a_row_whose_answer_is_cut_off_is_dropped_and_counted(byte_tokenizer, write_rows):
    path = write_rows([alpaca(0), {"instruction": "q" * 300, "output": "a"}])
    dataset, _ = run(byte_tokenizer, path, max_seq_len=80)
    assert (dataset.stats.rows, dataset.stats.truncated, dataset.stats.untrained) == (1, 1, 1)
    with pytest.raises(DataError, match=r"no usable row \(2 read: 2 with nothing to learn\)"):
        run(byte_tokenizer, path, max_seq_len=8)


def test_overlong_error_names_the_rows(byte_tokenizer, write_rows):
    path = write_rows([alpaca(0), alpaca(1, "y" * 400)])
    with pytest.raises(DataError, match=r"(?s)max_seq_len=100.*rows.jsonl:2: \d+ tokens"):
        run(byte_tokenizer, path, max_seq_len=100, overlong="error")


def test_bad_rows_stop_the_run_and_are_listed(byte_tokenizer, write_rows):
    path = write_rows([alpaca(0), {"instruction": "q", "output": 3}, *[b"{"] * 30])
    with pytest.raises(DataError) as caught:
        run(byte_tokenizer, path)
    message = str(caught.value)
    assert message.startswith("31 of 32 rows are bad - repair them, or set data.on_bad_row=skip:")
    assert f"\n  {path}:2: output: must be a string, not a number" in message
    assert message.count(f"{path}:") == 20 and "and 11 more" in message
    assert caught.value.exit_code == 3


def test_too_many_bad_rows_stop_the_run_even_with_skip(byte_tokenizer, write_rows):
    path = write_rows([*map(alpaca, range(9)), b"{"])
    assert run(byte_tokenizer, path, on_bad_row="skip", max_bad_fraction=0.1)[0].stats.bad == 1
    with pytest.raises(
        DataError, match=r"(?s)1 of 10 rows are bad, more than .*=0.09.*rows.jsonl:10"
    ):
        run(byte_tokenizer, path, on_bad_row="skip", max_bad_fraction=0.09)


def test_a_row_that_the_template_refuses_is_a_bad_row(write_rows):
    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    path = write_rows([alpaca(0), {**alpaca(1), "system": "x"}])
    with pytest.raises(DataError, match="rows.jsonl:2: the chat template refuses it: no system"):
        run(tokenizer, path)
    assert run(tokenizer, path, on_bad_row="skip", max_bad_fraction=0.5)[0].stats.bad == 1


@pytest.mark.parametrize("content", [[], [b""], [b"[]"], [b"\n\n"]])
def test_empty_data(byte_tokenizer, write_rows, content):
    for options in ({}, {"eval_fraction": 0.5}):
        with pytest.raises(DataError, match=r"rows.jsonl: no usable row \(empty\)"):
            run(byte_tokenizer, write_rows(content), **options)


def test_nothing_named_is_a_config_error(byte_tokenizer):
    with pytest.raises(ConfigError, match="data.train is empty"):
        run(byte_tokenizer, ())


def test_a_missing_template_is_a_config_error(write_rows):
    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template - set data.template to one of chatml"):
        run(tokenizer, write_rows([alpaca(0)]))


def test_ids_beyond_the_embedding_table_are_refused(byte_tokenizer, write_rows):
    with pytest.raises(WeightError, match=r"token id \d+ \('.*'\), but the model has only 50 "):
        run(byte_tokenizer, write_rows([alpaca(0)]), vocab_size=50)


def test_held_out_files_and_fractions(byte_tokenizer, write_rows):
    path = write_rows(map(alpaca, range(20)))
    other = write_rows(map(alpaca, range(100, 103)), "eval.jsonl")
    train, held_out = run(byte_tokenizer, path, eval=(other,), eval_fraction=0.5)
    assert (train.stats.rows, held_out.stats.rows) == (20, 3)

    def answers(dataset):
        return [e.messages[-1].content for e in dataset.examples]

    train, held_out = run(byte_tokenizer, path, eval_fraction=0.2)
    assert (len(train.rows), len(held_out.rows)) == (16, 4)
    assert sorted(answers(train) + answers(held_out)) == sorted(f"answer {i}" for i in range(20))
    assert answers(run(byte_tokenizer, path, eval_fraction=0.2)[1]) == answers(held_out)
    assert answers(run(byte_tokenizer, path, eval_fraction=0.2, seed=1)[1]) != answers(held_out)
    tiny = write_rows([alpaca(0), alpaca(1)], "two.jsonl")
    assert [len(d.rows) for d in run(byte_tokenizer, tiny, eval_fraction=0.001)] == [1, 1]
    with pytest.raises(DataError, match="cannot split one row"):
        run(byte_tokenizer, write_rows([alpaca(0)], "one.jsonl"), eval_fraction=0.5)


def test_the_fingerprint_follows_content_options_and_tokenizer(byte_tokenizer, write_rows):
    def fingerprint(path, tokenizer=byte_tokenizer, **options):
        return run(tokenizer, path, **options)[0].fingerprint

    path = write_rows(map(alpaca, range(4)))
    moved = write_rows(map(alpaca, range(4)), "moved.jsonl")
    changed = write_rows([*map(alpaca, range(3)), alpaca(9)], "changed.jsonl")
    base = fingerprint(path)
    assert base == fingerprint(path) == fingerprint(moved) == fingerprint(path, prefetch=0)
    different = {
        fingerprint(changed),
        fingerprint(path, max_seq_len=256),
        fingerprint(path, packing=False),
        fingerprint(path, train_on="all"),
        fingerprint(path, shuffle=False),
        fingerprint(path, load_tokenizer("tiny:llama", template="vicuna")),
    }
    assert len(different) == 6 and base not in different


def test_train_on_all(byte_tokenizer, write_rows):
    (row,) = run(byte_tokenizer, write_rows([alpaca(0)]), train_on="all")[0].rows
    assert row.trained.tolist() == [False] + [True] * (len(row.tokens) - 1)
    assert row.tokens.dtype == np.int32
