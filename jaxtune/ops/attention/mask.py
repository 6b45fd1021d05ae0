"""Which key a query sees: one record for a whole call and for a block of it."""

import dataclasses

import jax

# Stands for minus infinity, also in the log-sum-exp of a query that sees no key: finite, so that
# differences of two of them are numbers.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Intervals of query positions that do not see a key (FlashMask, arXiv 2410.01359).

    Key j is hidden from the queries in [lts[j], lte[j]) and in [uts[j], ute[j]). In a causal mask
    the first interval lies below the diagonal, in others the second above it as well. Packed rows
    need only lts: the end of the key's document.

    Attributes:
        lts, lte: int32 [B, S]; lts None: no such interval; lte None: it has no end.
        uts, ute: int32 [B, S]; ute None: no such interval; uts None: it starts at 0.
    """

    lts: jax.Array | None = None
    lte: jax.Array | None = None
    uts: jax.Array | None = None
    ute: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which key a query sees: one that every attribute lets it see.

    Query i has position query_offset + i (see `ops.attention`), key j has position j - prefix.

    Attributes:
        causal: keys later than the query are hidden.
        window: only keys less than this many positions before the query (on both sides of it if
            the mask is not causal) are seen; None: all.
        prefix: so many keys, the first ones, are seen by every query, whatever the rest says.
        query_segments, key_segments: int32 ids [B, T] and [B, S]; a query sees keys of its own
            segment only. Both None: one segment. The ids of prefix keys are never looked at.
        columns: intervals of query positions hidden from each key; None: none.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    prefix: int = dataclasses.field(default=0, metadata={"static": True})
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    columns: Columns | None = None


def visible(mask: Mask, positions: jax.Array, keys: jax.Array) -> jax.Array | None:
    """Whether the key is seen, for a block of queries and keys; None if nothing is masked.

    Everything broadcasts, so that the caller chooses the layout: for a block of scores
    [..., T, S] positions and query_segments end in [T, 1], keys, key_segments and columns in
    [1, S]; for transposed scores it is the other way round. Elementwise operations only, fit for
    the body of a kernel.

    Args:
        mask: the mask, its arrays cut to the block and shaped to broadcast.
        positions: int32, positions of the queries (query_offset + i).
        keys: int32, indices of the keys on the axis S (not their positions: prefix included).
    """
    parts = []
    distance = positions - (keys - mask.prefix)
    if mask.causal:
        parts.append(distance >= 0)
    if mask.window is not None:
        parts.append(distance < mask.window)
        if not mask.causal:
            parts.append(distance > -mask.window)
    if mask.query_segments is not None and mask.key_segments is not None:
        parts.append(mask.query_segments == mask.key_segments)
    if mask.columns is not None:
        lts, lte, uts, ute = (getattr(mask.columns, x) for x in ("lts", "lte", "uts", "ute"))
        if lts is not None:
            below = positions < lts
            parts.append(below if lte is None else below | (positions >= lte))
        if ute is not None:
            above = (positions < 0) if uts is None else positions < uts
            parts.append(above | (positions >= ute))
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen &= part
    return seen | (keys < mask.prefix) if mask.prefix else seen
