import pytest

from jaxtune.infer.text import cut, settled


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two", (), ("one two", False)),
        ("one two three", ("two",), ("one ", True)),
        ("one two three", ("three", "two"), ("one ", True)),
        ("one tw", ("two",), ("one tw", False)),
        ("two", ("two",), ("", True)),
    ],
)
def test_cut(text: str, stop: tuple, expected: tuple) -> None:
    assert cut(text, stop) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", (), "abc"),
        ("abc\n", ("\n\nUser:",), "abc"),
        ("abc\n\nUs", ("\n\nUser:", "x"), "abc"),
        ("abc\n\nAs", ("\n\nUser:",), "abc\n\nAs"),
        ("caf\ufffd", (), "caf"),
        ("", ("stop",), ""),
    ],
)
def test_settled_holds_back_what_may_change(text: str, stop: tuple, expected: str) -> None:
    assert settled(text, stop) == expected
