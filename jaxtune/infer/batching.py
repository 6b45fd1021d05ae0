"""Prompts of many lengths -> left-padded batches of few shapes.

Every shape is compiled once, so numbers of rows and of slots are rounded up to a short list of
sizes: lengths so that little is wasted where prompts are short, rows likewise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.errors import ConfigError

PIECE = 256  # prompt tokens that a row reads in one pass; longer prompts are multiples of it
MAX_ROWS = 128
MAX_CACHE_BYTES = 1 << 30


class Batch(NamedTuple):
    """Prompts that are continued together.

    Attributes:
        indices: of the prompts in the request; there may be fewer than rows.
        tokens: int32 [B, T], padded on the left, room for virtual tokens before each prompt; a row
            without a prompt is all padding.
        pad: int32 [B], padding before each prompt and its virtual tokens.
        limit: int32 [B], new tokens allowed.
        new_slots: room for new tokens, at least every limit.
    """

    indices: list[int]
    tokens: np.ndarray
    pad: np.ndarray
    limit: np.ndarray
    new_slots: int


def check_ids(ids: Any, name: str, config: Any) -> None:
    """Refuses token ids that the model lacks: JAX would clamp them."""
    if np.min(ids) < 0 or np.max(ids) >= config.vocab_size:
        raise ConfigError(
            f"{name} has token ids outside 0..{config.vocab_size - 1} - "
            "use the model's own tokenizer"
        )


def check_prompts(prompts: Sequence[Sequence[int]], model: Any) -> None:
    """Refuses with a ConfigError what the model cannot read."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {i} has no tokens - give each prompt some text")
        check_ids(prompt, f"prompt {i}", model.config)
        if len(prompt) >= model.max_tokens:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens, the model {model.max_tokens} positions "
                "- shorten the prompt"
            )


def make_batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, model: Any, row_multiple: int
) -> list[Batch]:
    """Batches from the longest prompts to the shortest, each as large as the cache may be.

    Args:
        prompts: token ids.
        max_new_tokens: for each prompt, if the model has as many positions left.
        model: gives `max_tokens`, `num_virtual_tokens` and the size of a cache.
        row_multiple: the number of rows is a multiple of it.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = model.num_virtual_tokens + len(prompts[order[0]])
    slots = rounded_length(longest) + rounded_length(max_new_tokens)
    cache = jax.eval_shape(lambda: model.make_cache(1, slots))
    bytes_per_row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    max_rows = max(1, min(MAX_ROWS, MAX_CACHE_BYTES // bytes_per_row))
    num_batches = -(-len(order) // max_rows)
    size = -(-len(order) // num_batches)
    num_rows = _round_up(_rounded_rows(size), row_multiple)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [_pad(prompts, part, num_rows, max_new_tokens, model) for part in parts]


def _pad(
    prompts: Sequence[Sequence[int]],
    indices: list[int],
    num_rows: int,
    max_new_tokens: int,
    model: Any,
) -> Batch:
    length = rounded_length(model.num_virtual_tokens + len(prompts[indices[0]]))
    tokens = np.zeros((num_rows, length), np.int32)
    pad = np.full(num_rows, length, np.int32)
    limit = np.zeros(num_rows, np.int32)
    for row, i in enumerate(indices):
        pad[row] -= model.num_virtual_tokens + len(prompts[i])
        tokens[row, -len(prompts[i]) :] = prompts[i]
        limit[row] = min(max_new_tokens, model.max_tokens - len(prompts[i]))
    return Batch(indices, tokens, pad, limit, rounded_length(int(limit.max())))


def rounded_length(length: int) -> int:
    """Slots for `length` tokens: a multiple of 16, above 128 of 32, above PIECE of PIECE."""
    step = 16 if length <= 128 else 32 if length <= PIECE else PIECE
    return _round_up(length, step)


def _rounded_rows(count: int) -> int:
    return 1 << (count - 1).bit_length() if count < 8 else _round_up(count, 8)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occurrences(prompts: Sequence[Sequence[int]], batch: Batch, vocab_size: int) -> np.ndarray:
    """Which tokens the prompt of each row holds: bool [B, V]."""
    seen = np.zeros((len(batch.tokens), vocab_size), np.bool_)
    for row, i in enumerate(batch.indices):
        seen[row, prompts[i]] = True
    return seen
