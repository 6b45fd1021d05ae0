"""Tokenized files are kept, found again, made anew when anything changes, and never half there."""

import io
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune.data import Example, Message, dataset, load, load_tokenizer, tokenize, workers
from jaxtune.data.batch import TokenRow
from jaxtune.data.table import table_of
from jaxtune.errors import ConfigError, DataError
from jaxtune.schema import Data


def alpaca(index):
    return {"instruction": f"question {index}", "output": "word " * (index % 7 + 1)}


def run(tokenizer, path, cache, **options):
    options = {"eval_fraction": 0.2, "max_seq_len": 512, "cache": str(cache), **options}
    return load(Data(train=(path,), **options), tokenizer, seed=0, vocab_size=259)


def equal(a, b):
    return a.fingerprint == b.fingerprint and a.stats == b.stats and same_rows(a.rows, b.rows)


def same_rows(a, b):
    pairs = zip(a, b, strict=True)
    return all(x.tokens.tolist() == y.tokens.tolist() for x, y in pairs) and len(a) == len(b)


def entries(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def tokenizations(monkeypatch):
    """Grows by one for every time that files are tokenized."""
    calls = []
    make = dataset.make_chunks
    monkeypatch.setattr(dataset, "make_chunks", lambda *a: calls.append(1) or make(*a))
    return calls


def test_files_are_tokenized_once(byte_tokenizer, write_rows, tmp_path, tokenizations):
    cache = tmp_path / "cache"
    path = write_rows(map(alpaca, range(40)))
    train, held_out = run(byte_tokenizer, path, cache)
    again, held_out_again = run(byte_tokenizer, path, cache)
    assert len(tokenizations) == 1 and len(entries(cache)) == 1
    assert equal(train, again) and equal(held_out, held_out_again)
    assert held_out_again.examples == held_out.examples and len(held_out.examples) == 8
    # What is done with the rows later does not matter, what they are does.
    run(byte_tokenizer, path, cache, shuffle=False, packer="greedy", eval_fraction=0.5)
    assert len(tokenizations) == 1
    run(byte_tokenizer, path, cache, max_seq_len=64)
    run(byte_tokenizer, path, cache, on_bad_row="skip")
    run(load_tokenizer("tiny:llama", template="vicuna"), path, cache)
    run(byte_tokenizer, path, cache, packer="concat")
    assert len(tokenizations) == 5
    uncached = run(byte_tokenizer, path, "")
    assert equal(uncached[0], train) and equal(uncached[1], held_out)
    assert len(entries(cache)) == 5


def test_a_changed_file_is_tokenized_again(byte_tokenizer, write_rows, tmp_path, tokenizations):
    before = run(byte_tokenizer, write_rows(map(alpaca, range(9))), tmp_path / "cache")[0]
    rows = [alpaca(i) for i in range(9)]
    rows[4]["output"] = "d" + rows[4]["output"][1:]  # of the same size
    after = run(byte_tokenizer, write_rows(rows), tmp_path / "cache")[0]
    assert len(tokenizations) == 2 and before.fingerprint != after.fingerprint


@pytest.mark.parametrize("file", ["tokens.bin", "lengths.npy", "meta.json"])
def test_a_damaged_entry_is_made_anew(byte_tokenizer, write_rows, tmp_path, capsys, file):
    path = write_rows(map(alpaca, range(9)))
    first = run(byte_tokenizer, path, tmp_path / "cache")[0]
    rows = [TokenRow(row.tokens.copy(), row.trained.copy()) for row in first.rows]
    (entry,) = entries(tmp_path / "cache")
    (entry / file).write_bytes((entry / file).read_bytes()[:-5])
    again = run(byte_tokenizer, path, tmp_path / "cache")[0]
    assert "is damaged" in capsys.readouterr().err
    assert same_rows(again.rows, table_of(rows)) and len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(("file", "content"), [("owners.npy", b""), ("meta.json", b"{}")])
def test_an_emptied_entry_is_made_anew(byte_tokenizer, write_rows, tmp_path, capsys, file, content):
    path = write_rows(map(alpaca, range(9)))
    first = run(byte_tokenizer, path, tmp_path / "cache")[0]
    (entry,) = entries(tmp_path / "cache")
    (entry / file).write_bytes(content)
    again = run(byte_tokenizer, path, tmp_path / "cache")[0]
    assert len(again.rows) == len(first.rows)
    assert "is damaged" in capsys.readouterr().err


def test_nothing_is_left_of_files_that_are_refused(byte_tokenizer, write_rows, tmp_path):
    path = write_rows([alpaca(0), b"{oops"])
    with pytest.raises(DataError, match="1 of 2 rows are bad"):
        run(byte_tokenizer, path, tmp_path / "cache")
    assert not entries(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_done_without(
    byte_tokenizer, write_rows, tmp_path, capsys
):
    (tmp_path / "file").touch()
    train, _ = run(byte_tokenizer, write_rows(map(alpaca, range(9))), tmp_path / "file" / "cache")
    assert "tokenized data are not kept" in capsys.readouterr().err and train.stats.records == 7


def test_workers_make_the_same_rows(byte_tokenizer, write_rows, tmp_path, monkeypatch):
    path = write_rows([*map(alpaca, range(50)), b"{", *map(alpaca, range(30))])
    options = {"on_bad_row": "skip", "max_bad_fraction": 0.1, "cache": ""}
    alone = run(byte_tokenizer, path, **options)
    monkeypatch.setattr(workers, "ALONE", 1)
    monkeypatch.setattr(workers, "BATCH", 8)
    together = run(byte_tokenizer, path, workers=2, **options)
    # Chunks are cut elsewhere, which the digest may show; the rows are the same.
    for a, b in zip(alone, together, strict=True):
        assert a.stats == b.stats and same_rows(a.rows, b.rows)
        assert all((x.trained == y.trained).all() for x, y in zip(a.rows, b.rows, strict=True))


def test_a_worker_that_dies_is_named(byte_tokenizer, write_rows, monkeypatch):
    monkeypatch.setattr(workers, "ALONE", 0)
    monkeypatch.setattr(workers.sys, "executable", "false")
    with pytest.raises(DataError, match="has ended by itself.*data.workers"):
        run(byte_tokenizer, write_rows(map(alpaca, range(9))), "", workers=1)


def test_what_a_worker_raises_is_raised(byte_tokenizer):
    def ask(answer: bytes):
        idle = queue.Queue()
        idle.put(SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO(answer)))
        return workers._ask(idle, [])

    chat = tokenize.chat_of(byte_tokenizer)
    good = Example((Message("user", "q"), Message("assistant", "a")))
    assert len(ask(workers._answer([good], chat, Data())).lengths) == 1
    with pytest.raises(AttributeError) as caught:
        ask(workers._answer([good], None, Data()))
    assert "make_chunk" in caught.value.__notes__[0]
    with pytest.raises(DataError, match="has ended by itself"):
        ask(workers._answer([good], chat, Data())[:-9])


RACE = """
import sys
from jaxtune.data import dataset, load, load_tokenizer
from jaxtune.schema import Data
make = dataset.make_chunks
dataset.make_chunks = lambda *a: print("tokenizing") or make(*a)
cfg = Data(train=(sys.argv[1],), cache=sys.argv[2])
train, _ = load(cfg, load_tokenizer("tiny:llama"), seed=0, vocab_size=259)
print(train.fingerprint)
"""


def test_processes_that_start_together_share_the_work(write_rows, tmp_path):
    path = write_rows(map(alpaca, range(300)))
    command = [sys.executable, "-c", RACE, path, str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(words.count("tokenizing") for words in outputs) == 1
    assert outputs[0][-1] == outputs[1][-1] and len(entries(tmp_path / "cache")) == 1
    assert np.load(next(iter(entries(tmp_path / "cache"))) / "lengths.npy").shape == (300,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "No module named 'no_such_module' - write module:function"),
        ("jsonn", "No module named 'jsonn' - write module:function"),
        ("json:laods", "has no attribute 'laods' - write module:function"),
        ("json:__name__", "is of type str - name a function of a row"),
        ("fails_when_imported:make", "data.function=fails_when_imported:make: '(' was never"),
    ],
)
def test_a_function_that_is_none_is_named_before_files_are_read(
    byte_tokenizer, tmp_path, monkeypatch, name, message
):
    (tmp_path / "fails_when_imported.py").write_text("def make(\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dataset, "sources_of", None)
    with pytest.raises(ConfigError) as caught:
        run(byte_tokenizer, "rows.jsonl", tmp_path / "cache", function=name)
    assert message in str(caught.value)
