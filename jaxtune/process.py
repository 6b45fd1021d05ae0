"""Which of a run's processes this one is, for whoever prints or writes.

Set once at start-up (`distributed.start`); one process until then. It is kept apart from JAX, which
would start its devices when asked.
"""

_index, _count = 0, 1


def set_place(index: int, count: int) -> None:
    """Says that this is process `index` of `count`."""
    global _index, _count
    _index, _count = index, count


def index() -> int:
    """The number of this process."""
    return _index


def count() -> int:
    """How many processes the run has."""
    return _count


def is_first() -> bool:
    """Whether this process logs and writes for all."""
    return _index == 0


def label() -> str:
    """What messages of this process begin with: nothing if it is the only one."""
    return f"process {_index}: " if _count > 1 else ""
