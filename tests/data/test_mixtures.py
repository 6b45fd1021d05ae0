import json

import pytest

from jaxtune.data import load
from jaxtune.data.mixtures import mix, sample
from jaxtune.errors import ConfigError, DataError
from jaxtune.schema import Data

STRATEGIES = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@pytest.mark.parametrize("how", STRATEGIES)
@pytest.mark.parametrize("weights", [(), (0.5, 0.2, 0.3), (1.0, 1.0, 8.0)])
def test_order_is_that_of_datasets(how, weights):
    datasets = pytest.importorskip("datasets")
    sizes = (30, 7, 12)
    theirs = datasets.interleave_datasets(
        [
            datasets.Dataset.from_dict({"pair": [[source, row] for row in range(size)]})
            for source, size in enumerate(sizes)
        ],
        probabilities=[weight / sum(weights) for weight in weights] or None,
        seed=5,
        stopping_strategy=STRATEGIES[how],
    )
    assert [list(pair) for pair in mix(sizes, how, weights, 5)] == theirs["pair"]


def test_empty_sources():
    with pytest.raises(DataError, match="source 2 of data.mix=interleave_over has no usable row"):
        mix((2, 0, 1), "interleave_over", (), 0)


def test_sampling():
    def rows(size, max_samples=None, num_samples=None, repeat=1.0, seed=0):
        chosen = sample(
            size, max_samples=max_samples, num_samples=num_samples, repeat=repeat, seed=seed
        )
        return chosen.tolist()

    assert rows(3) == [0, 1, 2]
    assert rows(9, max_samples=2) == [0, 1]
    assert rows(3, repeat=2.0) == [0, 1, 2, 0, 1, 2]
    half = rows(10, repeat=0.5)
    assert len(half) == 5 and half == sorted(half) == rows(10, repeat=0.5)
    assert half != rows(10, repeat=0.5, seed=1)
    assert sorted(rows(3, repeat=1.5)[:3]) == [0, 1, 2] and len(rows(4, repeat=1.5)) == 6
    assert len(set(rows(10, num_samples=4))) == 4
    twice = rows(3, num_samples=6)
    assert sorted(twice) == [0, 0, 1, 1, 2, 2]
    assert rows(0, num_samples=4) == rows(0, repeat=2.5) == []


def write_sources(write_rows):
    return [
        write_rows(
            [{"question": f"{name}{i}", "answer": name} for i in range(size)], f"{name}.json"
        )
        for name, size in (("a", 20), ("b", 4))
    ]


def run(tokenizer, paths, seed=0, **options):
    cfg = Data(train=tuple(paths), **options)
    return load(cfg, tokenizer, seed=seed, vocab_size=259)


def test_sources_are_mixed_and_counted(byte_tokenizer, write_rows):
    paths = write_sources(write_rows)

    def order(**options):
        dataset, _ = run(byte_tokenizer, paths, **options)
        assert sum(s.rows for s in dataset.stats.sources) == dataset.stats.rows
        assert sum(s.tokens for s in dataset.stats.sources) == dataset.stats.tokens
        assert [s.name for s in dataset.stats.sources] == paths
        assert f"\n  {paths[1]}: {dataset.stats.sources[1].rows} rows" in str(dataset.stats)
        return "".join(byte_tokenizer.decode(row.tokens)[-12] for row in dataset.rows)

    assert order() == "a" * 20 + "b" * 4
    assert order(max_samples=(3,)) == "aaabbb" and order(max_samples=(1, 2)) == "abb"
    assert order(repeats=(0.5, 2.0)) == "a" * 10 + "b" * 8
    assert order(mix="interleave_under") == "ab" * 4
    assert order(mix="interleave_over").count("b") == 20
    shares = order(mix="interleave_over", weights=(3.0, 1.0))
    assert shares == order(mix="interleave_over", weights=(3.0, 1.0))
    assert shares != order(mix="interleave_over", weights=(3.0, 1.0), seed=1)
    with pytest.raises(ConfigError, match="data.repeats has 3 values for 2 sources"):
        order(repeats=(1.0, 1.0, 1.0))


def test_held_out_rows_are_not_among_the_repeated(byte_tokenizer, write_rows):
    paths = write_sources(write_rows)
    train, held_out = run(byte_tokenizer, paths, repeats=(3.0,), eval_fraction=0.25)
    learnt, measured = (
        [byte_tokenizer.decode(row.tokens) for row in part.rows] for part in (train, held_out)
    )
    assert len(measured) == len(set(measured)) == 6 and not set(measured) & set(learnt)
    assert len(learnt) == 3 * 18


def test_held_out_rows_are_among_the_first_that_are_considered(byte_tokenizer, write_rows):
    options = {"max_samples": (8, 3), "eval_fraction": 0.3}
    parts = run(byte_tokenizer, write_sources(write_rows), **options)
    asked = [row.messages[0].content for part in parts for row in part.examples]
    assert sorted(asked) == [*(f"a{i}" for i in range(8)), "b0", "b1", "b2"]
    assert [len(part.rows) for part in parts] == [8, 3]


def test_rows_that_sft_cannot_learn(byte_tokenizer, write_rows):
    path = write_rows([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ConfigError, match="rows.jsonl:1: preferences cannot be trained on by"):
        run(byte_tokenizer, [path])


def test_texts_need_no_chat_template(write_rows):
    from jaxtune.data import load_tokenizer

    tokenizer = load_tokenizer("tiny:llama", template="none")
    dataset, _ = run(tokenizer, [write_rows([{"text": "one"}])])
    assert tokenizer.decode(dataset.rows[0].tokens) == "one<|im_end|>"
    dataset, _ = run(tokenizer, [write_rows([{"src": "q ", "tgt": "a"}])], template="none")
    (row,) = dataset.rows
    assert tokenizer.decode(row.tokens) == "q a<|im_end|>"
    assert tokenizer.decode(row.tokens[row.trained]) == "a<|im_end|>"
    with pytest.raises(ConfigError, match="no chat template - set data.template"):
        run(tokenizer, [write_rows([{"src": "q", "tgt": "a"}])])


def test_the_fingerprint_follows_sources_and_what_is_drawn(byte_tokenizer, write_rows, tmp_path):
    paths = write_sources(write_rows)
    one_source = str(tmp_path / "?.json")
    of = [run(byte_tokenizer, given)[0].fingerprint for given in (paths, paths, [one_source])]
    assert of[0] == of[1] != of[2]
    registry = tmp_path / "dataset_info.jsonc"
    columns = {"prompt": "question", "response": "answer"}
    for more in ({}, {"num_samples": 20}):
        registry.write_text(json.dumps({"a": {"file_name": "a.json", "columns": columns, **more}}))
        of.append(run(byte_tokenizer, ["a"], registry=str(registry))[0].fingerprint)
    assert of[3] != of[4]
