"""What holds for every method of the table."""

import pytest

from jaxtune import peft
from jaxtune.schema import Peft


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full", "rank": 4}, "peft.rank=4 would be ignored: peft.method=full"),
        ({"method": "full", "adapter": "folder"}, "peft.adapter='folder' would be ignored"),
        ({"adapter": "folder", "alpha": 3.0}, "peft.alpha=3.0 would be ignored: peft.adapter bri"),
        ({"adapter": "folder", "layers_to_transform": (1,)}, "layers_to_transform=(1,) would be"),
    ],
)
def test_options_that_a_method_does_not_read_are_named(options: dict, message: str):
    (problem,) = peft.unread(Peft(**options))
    assert message in problem


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"adapter": "folder", "dropout": 0.1}])
def test_options_that_are_read_are_no_problem(options: dict):
    assert peft.unread(Peft(**options)) == []
