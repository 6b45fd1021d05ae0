"""The TPU kernels in interpret mode against the float32 reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.attention import blocks, flash, pallas_tpu
from jaxtune.ops.attention.mask import Mask
from jaxtune.ops.attention.pallas_tpu import Sizes
from tests import tolerances
from tests.ops import attention_cases

SMALL = Sizes(queries=64, keys=64, part=32)


def interpreted(sizes: Sizes = SMALL, span: int = 128) -> attention_cases.Attend:
    """The implementation, run as a program on CPU with small blocks."""
    return functools.partial(
        flash.attend,
        flash.Passes(
            functools.partial(pallas_tpu.forward, sizes=sizes, interpret=True),
            functools.partial(pallas_tpu.backward, sizes=sizes, span=span, interpret=True),
        ),
    )


def test_is_the_reference() -> None:
    for case in attention_cases.cases(6, longest=150):
        attention_cases.check(interpreted(), case, tolerances.OPS)


def test_is_the_reference_in_bfloat16() -> None:
    for case in attention_cases.cases(2, dtype=jnp.bfloat16, first=1000, longest=150):
        attention_cases.check(interpreted(), case, tolerances.OPS_BFLOAT16)


def packed(length: int, documents: int) -> np.ndarray:
    """Segment ids [1, length] of a row with padding at its end."""
    random = np.random.default_rng(documents)
    cuts = np.sort(random.choice(np.arange(1, length), documents, replace=False))
    ids = np.zeros((1, length), np.int32)
    for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
        ids[:, start:end] = number
    return ids


@pytest.mark.parametrize("size", [128, 512, 1024])
def test_packed_row_visits_hardly_more_than_it_must(size: int) -> None:
    ids = packed(8192, 16)
    mask = Mask(query_segments=jnp.asarray(ids), key_segments=jnp.asarray(ids))
    some, _ = blocks.seen_blocks(mask, 0, (8192, 8192), (size, size))
    least = blocks.least_blocks(mask, 0, (8192, 8192), (size, size))
    assert not (least & ~np.asarray(some)).any()
    assert np.asarray(some).sum() <= 1.1 * least.sum()
