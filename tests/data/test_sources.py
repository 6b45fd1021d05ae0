import gzip
import json
import re

import pytest

from jaxtune.data.rows import BadRow, Record
from jaxtune.data.sources import hash_files, read
from jaxtune.errors import DataError

ROWS = [{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2 \u2028 \u0085 x"}]
LIMIT = 1 << 20


def fields(path):
    rows = list(read(str(path), LIMIT))
    assert all(isinstance(row, Record) for row in rows), rows
    return [row.fields for row in rows]


def lines(rows=ROWS, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


@pytest.mark.parametrize(
    "content",
    [
        lines() + b"\n",
        lines(),
        lines(end="\r\n") + b"\r\n",
        lines(end="\n\n \n") + b"\n\n",
        b"\xef\xbb\xbf" + lines(),
        gzip.compress(lines(), mtime=0),
        json.dumps(ROWS, indent=2).encode(),
        b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode(),
        gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    ],
    ids=[
        "lines",
        "no-final-newline",
        "crlf",
        "blank",
        "bom",
        "gz",
        "array",
        "bom-array",
        "gz-array",
    ],
)
def test_the_kind_is_read_from_the_content_not_the_name(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert fields(path) == ROWS


def test_origins_name_line_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + lines(end="\n\n"))
    assert [row.origin for row in read(str(path), LIMIT)] == [f"{path}:2", f"{path}:4"]
    path.write_text(json.dumps(ROWS))
    assert [row.origin for row in read(str(path), LIMIT)] == [f"{path}:row 1", f"{path}:row 2"]


def test_parquet_and_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    messages = [{"messages": [{"role": "user", "content": "q"}]}, {"messages": []}]
    for rows in (ROWS, messages):
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(str(tmp_path / "rows.json"))
        assert fields(tmp_path / "rows.json") == rows
        made.select([1, 0]).save_to_disk(str(tmp_path / "folder"))
        assert fields(tmp_path / "folder") == rows[::-1]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="several splits.*both/train or .*both/test"):
        fields(tmp_path / "both")
    assert fields(tmp_path / "both" / "train") == messages


BAD_LINES = {
    "syntax": (b'{"a": 1', "column 8: invalid JSON"),
    "trailing": (b'{"a": 1} x', "column 10: invalid JSON: Extra data"),
    "single-quotes": (b"{'a': 1}", "column 2: invalid JSON"),
    "utf8": (b'{"a": "\xff"}', "byte 8: invalid UTF-8"),
    "raw-nul": (b'{"a": "\0"}', "column 8: invalid JSON: Invalid control character"),
    "nan": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "duplicate": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "c: is given twice"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "long": (b'{"a": "' + b"x" * (3 * LIMIT) + b'"}', f"longer than data.max_line_bytes={LIMIT}"),
    "not-object": (b"3", "must be an object of fields, not a number"),
    "null": (b"null", "must be an object of fields, not null"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_reported_and_the_others_are_read(tmp_path, case):
    line, reason = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"first": 1}\n' + line + b'\n{"last": 1}\n')
    first, bad, last = read(str(path), LIMIT)
    assert first.fields == {"first": 1} and last.fields == {"last": 1}
    assert last.origin == f"{path}:3"
    assert isinstance(bad, BadRow) and bad.origin == f"{path}:2"
    assert reason in str(bad)


def test_array_elements_that_are_not_objects_are_bad_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 2, "x"]')
    assert [str(row) for row in read(str(path), LIMIT)][1:] == [
        f"{path}:row 2: a row must be an object of fields, not a number",
        f"{path}:row 3: a row must be an object of fields, not a string",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a" 2}]', ":2: column 7: invalid JSON"),
        (b'[{"a": NaN}]', "NaN is not JSON"),
        (b'[{"a": 1, "a": 2}]', "a: is given twice"),
        (b'[{"a":\n "\xff"}]', ":2: invalid UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"PAR1 nothing more", "as Parquet"),
        (gzip.compress(lines(), mtime=0)[:-20], "cannot read"),
        (b"\x1f\x8b rubbish", "cannot read"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(read(str(path), LIMIT))
    assert str(path) in str(caught.value) and caught.value.exit_code == 3


def test_hash_depends_on_contents_and_order_only(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert hash_files([a, b]) == hash_files([c, b])
    assert len({hash_files(x) for x in ([a, b], [b, a], [a], [a, c])}) == 4


CSV = 'question,answer\n"a, b",1\n"c\nd",\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (CSV, [{"question": "a, b", "answer": "1"}, {"question": "c\nd", "answer": None}]),
        ("\ufeffq\ta\nx\ty\n", [{"q": "x", "a": "y"}]),
        ('{\n  "a": [1,\n 2]\n}', [{"a": [1, 2]}]),
        ('{"a": 1}', [{"a": 1}]),
    ],
)
def test_tables_and_single_objects_under_a_wrong_name(tmp_path, content, expected):
    for name in ("rows.json", "rows.txt"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert fields(tmp_path / name) == expected
    (tmp_path / "rows.csv").write_bytes(gzip.compress(content.encode()))
    assert fields(tmp_path / "rows.csv") == expected


def test_bad_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1,2\n1,2\n1,2\n3\n5,6\n")
    rows = list(read(path, LIMIT))
    assert str(rows[4]) == f"{path}:row 5: has 1 cells, the first line 2" and len(rows) == 6
    path.write_bytes(b"a,b\n1,2\n\xff,3\n")
    with pytest.raises(DataError, match="save it as UTF-8"):
        list(read(path, LIMIT))
    path.write_text('a,b\n1,2\n1,2\n1,2\n1,2\n"x" y,2\n')
    with pytest.raises(DataError, match="row 5: .*repair the file"):
        list(read(path, LIMIT))


def test_arrow_files_and_streams(tmp_path):
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    for make in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        path = tmp_path / "rows.json"
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
        assert fields(path) == ROWS
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match="cannot read"):
            list(read(path, LIMIT)) and path.write_bytes(b"ARROW1")


TEXT = "One, two:\r\nthree\n\n[4] four\n \nfive"


@pytest.mark.parametrize(
    ("rows", "expected", "lines"),
    [
        ("line", ["One, two:", "three", "", "[4] four", " ", "five"], [1, 2, 3, 4, 5, 6]),
        ("paragraph", ["One, two:\r\nthree", "[4] four", "five"], [1, 4, 6]),
        ("file", [TEXT], [1]),
    ],
)
def test_plain_text(tmp_path, rows, expected, lines):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    found = list(read(path, LIMIT, rows))
    assert [row.fields for row in found] == [{"text": text} for text in expected]
    assert [row.origin for row in found] == [f"{path}:{line}" for line in lines]


def test_bad_plain_text(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"good\n" + b"x" * 300 + b"\n\xff\nlast")
    for rows, expected in (("line", [1, 0, 0, 1]), ("paragraph", [0]), ("file", [0])):
        found = list(read(path, 200, rows))
        assert [isinstance(row, Record) for row in found] == expected
    assert "longer than data.max_line_bytes=200" in str(list(read(path, 200))[1])
    assert str(list(read(path, 200))[2]) == f"{path}:3: byte 1: invalid UTF-8"
    # What is called JSON and is none is not learnt as text.
    (tmp_path / "rows.jsonl").write_bytes(b"oops\n{}")
    assert isinstance(next(read(tmp_path / "rows.jsonl", LIMIT)), BadRow)
