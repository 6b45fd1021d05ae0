import os
import sys
from typing import Any

import pytest

from jaxtune import errors


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("DataError", 3),
        ("WeightError", 4),
        ("NumericsError", 5),
        ("HangError", 70),
        ("PeerError", 71),
        ("StorageError", 74),
        ("PreemptedError", 75),
        ("LockedError", 76),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_one_line_and_the_exit_code(
    name: str,
    code: int,
    debug: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["command"] + ["--debug"] * debug)

    def main() -> Any:
        raise getattr(errors, name)("x=3 is wrong - use 4")

    errors.run_command(main)
    err = capsys.readouterr().err
    assert codes == [code]
    assert err.endswith("jaxtune: error: x=3 is wrong - use 4\n")
    assert ("Traceback" in err) is debug


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        errors.run_command(lambda: 1 // 0)


def test_listing():
    assert errors.listing(["a", "b"]) == "\n  a\n  b"
    assert errors.listing("abcd", limit=2) == "\n  a\n  b\n  ... and 2 more"
