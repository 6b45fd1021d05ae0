"""What `python -m jaxtune.data` prints and writes."""

import json
import sys

import numpy as np
import pytest

from jaxtune.data import TokenRow, __main__, look
from jaxtune.data.table import table_of
from jaxtune.errors import ConfigError
from jaxtune.schema import Data

CONFIG = """
from jaxtune import config

def get_config():
    c = config.default()
    c.data.train = ({path!r},)
    c.data.max_seq_len = 128
    c.train.num_steps = 1
    return c
"""


@pytest.fixture
def printed(write_rows, tmp_path, monkeypatch, capsys):
    """Runs the command on six rows, two of them the same, and returns what it prints."""
    rows = [{"instruction": f"q{i % 5}", "output": "x" * (1 + i % 5)} for i in range(6)]
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=write_rows(rows)))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["jaxtune.data", f"--config={config}", *options])
        __main__.main()
        return capsys.readouterr().out

    return run


def test_the_report(printed, tmp_path):
    picture, rows = tmp_path / "lengths.png", tmp_path / "out.jsonl"
    text = printed("--samples=2", f"--histogram={picture}", f"--export={rows}")
    assert "training data: 6 rows" in text and "(22 trained)" in text
    assert "duplicates: 1 rows" in text
    assert "rows of 128 tokens (best_fit)" in text and "% padding" in text
    assert "q0<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>⟧\n" in text
    assert text.count("row ") >= 2 and "row 3:" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == 6 and sum(sum(row["trained"]) for row in written) == 22
    assert all(len(row["tokens"]) == len(row["trained"]) for row in written)


def test_a_stream_is_looked_at_without_reading_it_all(printed):
    text = printed("--config.data.streaming=true", "--samples=0")
    assert "streamed from" in text and "lengths in tokens" in text and "row 0" not in text


def test_the_rows_are_those_of_training(printed):
    text = printed(
        "--config.model.path=tiny:chatglm",
        "--config.data.template=qwen3",
        "--config.data.enable_thinking=false",
        "--config.peft.method=prompt",
        "--config.peft.num_virtual_tokens=9",
        "--samples=1",
    )
    plain = printed("--config.data.template=qwen3", "--samples=1")
    assert f"row 0:\n{9 * '<|endoftext|>'}<|im_start|>user" in text
    assert "</think>\n\n⟦x" in text and "⟦<think>" in plain


def test_wrong_options_are_refused(printed):
    with pytest.raises(ConfigError, match="samples"):
        printed("--samples=many")


def test_histogram_counts_every_row_once():
    lengths = np.random.default_rng(0).integers(3, 900, 500)
    table = table_of(TokenRow(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths)
    lines = look.histogram(table).splitlines()
    assert sum(int(line.split()[3]) for line in lines) == 500 and len(lines) <= look.BARS
    assert lines[0].split()[0] == str(lengths.min())
    (line,) = look.histogram(table.select([0])).splitlines()
    assert line.split()[3] == "1"


def test_padding_is_that_of_the_packer():
    rows = [TokenRow(np.zeros(n, np.int32), np.ones(n, bool)) for n in (6, 6, 4, 4)]
    table = table_of(rows)
    assert "2 rows of 10 tokens (best_fit), 0.00% padding" in look.padding(
        table, Data(max_seq_len=10), 0
    )
    unpacked = Data(max_seq_len=10, packing=False, pad_to="longest")
    assert "4 rows of 10 tokens (one example a row), 50.00% padding at most" in look.padding(
        table, unpacked, 0
    )
