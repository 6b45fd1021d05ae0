"""Attention with linear biases (Press et al. 2021, arXiv 2108.12409)."""

import math


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head: 2^(-8 i / n) for i = 1 ... n, if n is a power of two.

    Otherwise those of the power of two below, and then every other one of the power above, as the
    paper's code, BLOOM and Baichuan have it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return (*slopes, *between)
