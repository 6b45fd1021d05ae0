import json

import pytest

from jaxtune.data.examples import Classified, Preference, Rated
from jaxtune.data.formats import FORMATS, apply, recognise, row_function, to_example
from jaxtune.data.rows import Record, RowError
from jaxtune.errors import ConfigError, DataError

SAID = {"role": "assistant", "content": "x"}
RANKED = {"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [0, 1]}
M0, M0_CALL = "messages[0].content[0]", "messages[0].tool_calls[0].name"


def convert(format_name, fields):
    return turns(to_example(Record("f:1", fields), format_name).messages)


def turns(messages):
    return [tuple(m[:2]) for m in messages]


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
    ("alpaca", {"instruction": "q", "output": "a", "tools": "[{]"}, "tools", "invalid JSON"),
    ("alpaca", {"instruction": "q", "output": "a", "tools": [{}]}, "tools[0].name", "is missing"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, M0, "is image"),
    ("messages", {"messages": [{**SAID, "weight": 0.5}]}, "messages[0].weight", "true or false"),
    ("messages", {"messages": [{**SAID, "tool_calls": [{}]}]}, M0_CALL, "is missing"),
    ("sharegpt", {"conversations": [{"from": "bot?", "value": "x"}]}, "conversations[0].from", ""),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0].content", "not null"),
    ("src_tgt", {"src": ["a", "b"], "tgt": ["c"]}, "tgt", "has 1 turns, src has 2"),
    ("src_tgt", {"src": [], "tgt": []}, "src", "is empty"),
    ("src_tgt", {"src": ["a"], "tgt": [None]}, "tgt[0]", "not null"),
    ("src_tgt", {"src": "a", "tgt": "b", "context": {"user": 1}}, "context.user", "unknown"),
    ("ranked", {**RANKED, "sort": [1, 1]}, "sort", "two different numbers"),
    ("ranked", {**RANKED, "sort": [1]}, "sort", "has 1 items"),
    ("ranked", {**RANKED, "response": ["a", ""]}, "response[1]", "is empty"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "is the same"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected", "not a number"),
    ("multiple_choice", {"question": "q", "choices": ["x"], "answer": "C"}, "answer", "name one"),
    ("rated", {"messages": [], "label": "perhaps"}, "label", "must be true or false"),
    ("classified", {"text": "t", "label": None}, "label", "not null"),
    ("text", {"text": None}, "text", "not null"),
    ("document", {"paragraphs": ["x", 3]}, "paragraphs[1]", "not a number"),
    ("xtuner", {"conversation": []}, "conversation", "is empty"),
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
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "is tool;"),
    ("messages", {"messages": [{"role": "judge"}]}, "messages[0].role", "is 'judge'"),
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
        recognise(Record("f:1", {"topic": "q", "solution": "a"}))
    message = str(caught.value)
    assert "f:1" in message and "topic, solution" in message
    assert all(name in message for name in FORMATS)


CALL = {"name": "f", "arguments": {"x": 1}}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# For each format: a row, by whose fields it must be recognised, and its turns.
ROWS = [
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ),
    ("xtuner", {"conversation": [{"input": "q", "output": "a"}]}),
    ("src_tgt", {"src": "q", "tgt": "a"}),
    ("src_tgt", {"src": ["q"], "tgt": ["a"]}),
    ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}),
    ("qa", {"question": "q", "answer": "a"}),
    ("qa", {"query": "q", "response": "a"}),
    ("qa", {"input": "q", "output": "a"}),
    (
        "messages",
        {"messages": '[{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]'},
    ),
    (
        "messages",
        {"messages": [{**USER, "content": [{"type": "text", "text": "q"}]}, ANSWER], "tools": None},
    ),
]


@pytest.mark.parametrize(("name", "fields"), ROWS)
def test_a_question_and_its_answer_in_every_format(name, fields):
    assert recognise(Record("f:1", fields)) == name
    assert convert(name, fields) == [("user", "q"), ("assistant", "a")]


def test_system_texts():
    rows = [
        ("sharegpt", {**ROWS[0][1], "system": "s"}),
        ("xtuner", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}),
        ("src_tgt", {"src": "q", "tgt": "a", "context": {"system": "s"}}),
        ("qa", {"question": "q", "answer": "a", "system": "s"}),
        ("messages", {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}),
    ]
    for name, fields in rows:
        assert convert(name, fields) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_tool_calls_become_those_of_openai():
    tool = {"name": "f", "description": "d", "parameters": {}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([tool]),
    }
    openai = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "f"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    for name, fields in (("sharegpt", sharegpt), ("messages", openai)):
        example = to_example(Record("f:1", fields), name)
        assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
        (call,) = example.messages[1].tool_calls
        assert call["function"] == CALL and example.tools[0]["function"] == tool
    assert example.messages[1].for_template() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
    }
    assert example.messages[2].for_template()["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    "mark", [{"train": False}, {"weight": 0}, {"loss": False}, {"weight": 0.0}]
)
def test_marks_of_single_answers(mark):
    fields = {"messages": [USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1}]}
    trained = [m.trained for m in to_example(Record("f:1", fields), "messages").messages]
    assert trained == [True, False, True, True]


def test_marks_of_other_formats():
    fields = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    made = to_example(Record("f:1", fields), "prompt_completion")
    assert [m.trained for m in made.messages if m.role == "assistant"] == [False, True]
    fields = {"conversation": [{"input": "q", "output": "a", "output_with_loss": False}]}
    assert not to_example(Record("f:1", fields), "xtuner").messages[-1].trained
    reasoning = {"messages": [USER, {**ANSWER, "reasoning": "because"}]}
    assert to_example(Record("f:1", reasoning), "messages").messages[-1].reasoning == "because"


def test_texts_are_raw():
    assert to_example(Record("f:1", {"prompt": "q", "completion": "a"}), "prompt_completion").raw
    rows = [
        ("text", {"text": "one\ntwo"}),
        ("document", {"title": "one", "paragraphs": ["two"]}),
        ("document", {"content": [{"chapter": "one", "content": ["two"]}]}),
        ("xtuner", {"conversation": [{"input": "", "output": "one\ntwo"}]}),
    ]
    for name, fields in rows:
        assert recognise(Record("f:1", fields)) == name
        example = to_example(Record("f:1", fields), name)
        assert example.raw and turns(example.messages) == [("assistant", "one\ntwo")]


@pytest.mark.parametrize("answer", ["B", 1, "y"])
def test_multiple_choice(answer):
    fields = {"question": "q?", "choices": ["x", "y"], "answer": answer}
    assert recognise(Record("f:1", fields)) == "multiple_choice"
    assert convert("multiple_choice", fields) == [("user", "q?\nA. x\nB. y"), ("assistant", "B")]


GOOD, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}]}
PREFERENCES = [
    ("preference", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    (
        "preference",
        {
            **SHAREGPT,
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ),
    ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [WORSE]}),
    ("preference", {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, WORSE]}),
    ("preference", {"chosen": [USER, GOOD], "rejected": [USER, WORSE]}),
    ("preference", {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, WORSE]}),
    ("preference", {"chosen": "qgood", "rejected": "qbad"}),
    ("rejected", {"messages": [USER, GOOD], "rejected_response": "bad"}),
    ("rejected", {"messages": [USER, GOOD], "rejected_messages": [USER, WORSE]}),
    ("ranked", {"src": ["q"], "tgt": [], "response": ["bad", "good"], "sort": [0, 1]}),
    ("ranked", {"src": "q", "tgt": [], "response": ["good", "bad"], "sort": [2, 1]}),
]


@pytest.mark.parametrize(("name", "fields"), PREFERENCES)
def test_preferences(name, fields):
    assert recognise(Record("f:1", fields)) == name
    made = to_example(Record("f:1", fields), name)
    assert isinstance(made, Preference) and made.origin == "f:1"
    assert turns(made.prompt) == [("user", "q")]
    assert turns(made.chosen) == [("assistant", "good")]
    assert turns(made.rejected) == [("assistant", "bad")]


RATED = [
    {"messages": [USER, ANSWER], "label": True},
    {**ROWS[0][1], "kto_tag": True},
    {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
    {"prompt": "q", "completion": "a", "label": True},
]


@pytest.mark.parametrize("fields", RATED)
def test_rated_answers(fields):
    assert recognise(Record("f:1", fields)) == "rated"
    made = to_example(Record("f:1", fields), "rated")
    assert isinstance(made, Rated) and made.good
    assert turns(made.messages) == [("user", "q"), ("assistant", "a")]
    # A column of that name with anything but booleans is only more information.
    named = {key: "math" if value is True else value for key, value in fields.items()}
    assert recognise(Record("f:1", named)) != "rated"


def test_classes():
    rows = [
        ({"text": "t", "label": 3}, ("t",), 3),
        ({"sentence1": "t", "sentence2": "u", "label": "yes"}, ("t", "u"), "yes"),
        ({"premise": "t", "hypothesis": "u", "label": 0.5}, ("t", "u"), 0.5),
    ]
    for fields, texts, label in rows:
        assert recognise(Record("f:1", fields)) == "classified"
        made = to_example(Record("f:1", fields), "classified")
        assert isinstance(made, Classified) and (made.texts, made.label) == (texts, label)


def test_functions_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "def fields(row):\n"
        "    return None if row['skip'] else {'text': row['body'].upper()}\n"
        "def wrong(row):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    convert_row = row_function("own_rows:fields")
    assert apply(convert_row, {"skip": False, "body": "x"}) == {"text": "X"}
    assert apply(convert_row, {"skip": True}) is None
    with pytest.raises(RowError, match="data.function raised KeyError"):
        apply(convert_row, {})
    with pytest.raises(RowError, match="data.function returned int"):
        apply(row_function("own_rows:wrong"), {})
    for name in ("own_rows:nothing", "no_such_module:f", "own_rows"):
        with pytest.raises(ConfigError, match=f"data.function={name}.*write module:function"):
            row_function(name)
