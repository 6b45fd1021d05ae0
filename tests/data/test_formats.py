import pytest

from jaxtune.data.formats import FORMATS, recognise, to_example
from jaxtune.data.sources import Record, RowError
from jaxtune.errors import DataError


def convert(format_name, fields):
    return [tuple(m) for m in to_example(Record("f:1", fields), format_name).messages]


def say(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[t[0]], "content": t[1:]} for t in turns]}


def test_alpaca():
    assert convert("alpaca", {"instruction": "q", "output": "a"}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    full = {
        "instruction": "q",
        "input": "more",
        "output": "a",
        "system": "be kind",
        "history": [["u1", "a1"], ["u2", "a2"]],
        "unknown": 3,
    }
    assert convert("alpaca", full) == [
        ("system", "be kind"),
        ("user", "u1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", "a2"),
        ("user", "q\nmore"),
        ("assistant", "a"),
    ]
    nothing = {"instruction": "q", "output": "a", "input": None, "system": "", "history": None}
    assert convert("alpaca", nothing) == [("user", "q"), ("assistant", "a")]


def test_messages():
    assert convert("messages", say("sbe kind", "uq", "aa", "ur", "ab")) == [
        ("system", "be kind"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    ]


BAD = [
    ("alpaca", {"output": "a"}, "instruction", "is missing"),
    ("alpaca", {"instruction": "q"}, "output", "is missing"),
    ("alpaca", {"instruction": "q", "output": None}, "output", "must be a string, not null"),
    ("alpaca", {"instruction": "q", "output": 3}, "output", "must be a string, not a number"),
    ("alpaca", {"instruction": ["q"], "output": "a"}, "instruction", "not a list"),
    ("alpaca", {"instruction": "q", "output": {"x": 1}}, "output", "not an object"),
    ("alpaca", {"instruction": "q", "input": True, "output": "a"}, "input", "not a boolean"),
    ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history", "a list of pairs"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]", "a pair"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", 1]]}, "history[0][1]", "stri"),
    ("alpaca", {"instruction": "q\0", "output": "a"}, "instruction", "character 2 is U+0000"),
    ("alpaca", {"instruction": "q", "output": "ab\ud83d"}, "output", "character 3 is half"),
    ("messages", {}, "messages", "is missing"),
    ("messages", {"messages": "hello"}, "messages", "is a string"),
    ("messages", {"messages": []}, "messages", "is empty"),
    ("messages", {"messages": ["x"]}, "messages[0]", "must be an object, not a string"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
    ("messages", {"messages": [{"content": "x"}]}, "messages[0].role", "is None"),
    ("messages", {"messages": [{"role": "user"}]}, "messages[0].content", "not null"),
    ("messages", say("uq", "ur", "aa"), "messages[1].role", "assistant is due"),
    ("messages", say("aa"), "messages[0].role", "user is due"),
    ("messages", say("uq", "sx", "aa"), "messages[1].role", "is system"),
    ("messages", say("uq"), "messages", "must end with the assistant"),
    ("messages", say("sx"), "messages", "must end with the assistant"),
]


@pytest.mark.parametrize(("format_name", "fields", "field", "reason"), BAD)
def test_bad_rows_name_the_field_and_the_reason(format_name, fields, field, reason):
    with pytest.raises(RowError) as caught:
        convert(format_name, fields)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_recognise():
    assert recognise(Record("f:1", {"instruction": "q", "output": "a"})) == "alpaca"
    assert recognise(Record("f:1", say("uq", "aa"))) == "messages"
    with pytest.raises(DataError) as caught:
        recognise(Record("f:1", {"question": "q", "answer": "a"}))
    message = str(caught.value)
    assert "f:1" in message and "question, answer" in message
    assert all(name in message for name in FORMATS)
