"""Notes for the readers of a compiled program, in the names of its operations.

How often a loop runs may depend on data, and a kernel for a GPU hides its products: the program's
text says neither. What makes them says it in a named scope, which costs nothing when it runs.
"""

import contextlib
import re

import jax


def at_most(trips: int) -> contextlib.AbstractContextManager:
    """Around a loop: it makes no more trips than this."""
    return jax.named_scope(f"at_most_{trips}_trips")


def flops(count: float) -> contextlib.AbstractContextManager:
    """Around a kernel: FLOPs of one call, at most."""
    return jax.named_scope(f"kernel_of_{count:.0f}_flops")


def noted_trips(text: str) -> int | None:
    """The trips of a loop that stands in `at_most` itself, from an instruction's attributes."""
    found = re.search(r'op_name="[^"]*at_most_(\d+)_trips\)*/while"', text)
    return int(found[1]) if found else None


def noted_flops(text: str) -> float | None:
    """The FLOPs of a kernel in `flops`, from an instruction's attributes."""
    found = re.search(r'op_name="[^"]*kernel_of_(\d+)_flops', text)
    return float(found[1]) if found else None
