"""Attention: one function, several implementations.

`reference` is dense and float32, the oracle of the tests. `xla`, `pallas_tpu` and `pallas_gpu` work
in blocks, skip those that the mask empties, and save only the inputs, the output and the
log-sum-exp. `splash` and `cudnn` are libraries' kernels, for the calls that they can answer.
Decoding has a function of its own, `cached.py`, because the cache is a second set of keys.

An implementation is a module with a function `attend(operands) -> (y, lse)`, imported when it is
first asked for. Those of our own give `flash.py` their forward and backward pass.
"""

import importlib
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtune.ops.attention.flash import Operands
from jaxtune.ops.attention.mask import Columns, Mask

__all__ = [
    "IMPLEMENTATIONS",
    "Columns",
    "Extras",
    "Mask",
    "attention",
    "attention_with_lse",
    "make_operands",
]

CAUSAL = Mask()

# Each is the module of this folder that bears its name.
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu", "splash", "cudnn")


class Extras(TypedDict, total=False):
    """What a call may say besides q, k, v and the mask; each has a default.

    Attributes:
        scale: what q k^T is multiplied with; None: 1 / sqrt(H).
        softcap: scores become softcap * tanh(scores / softcap), before bias and mask (Gemma 2);
            None: they stay.
        sinks: float32 [N], one more logit for each head that only takes part in the softmax's
            denominator (gpt-oss); counted in the log-sum-exp and differentiable. None: none.
        alibi: float32 [N], slopes of the bias -slope * |query position - key position|
            (arXiv 2108.12409), which prefix keys do not get; no gradient. None: no bias.
        relative: float32 [N, 2M - 1], what is added to the scores of each head: column M - 1 + d
            where the key lies d positions behind the query (arXiv 1910.10683, section 2.1); M is
            at least T and S. Differentiable; not with a prefix or an offset. None: nothing is.
        query_offset: position of the first query on the axis of key positions: tokens in the
            cache, or how far apart two shards of a row are. 0 by default.
        softmax_dtype: dtype in which probabilities meet the values (scores, their softmax and all
            sums are float32). float32 by default.
    """

    scale: float | None
    softcap: float | None
    sinks: jax.Array | None
    alibi: jax.Array | None
    relative: jax.Array | None
    query_offset: int | jax.Array
    softmax_dtype: DTypeLike


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = CAUSAL,
    implementation: str = "xla",
    **extras: Unpack[Extras],
) -> jax.Array:
    """softmax(mask(q k^T scale)) v, by default causal.

    A query that sees no key gives 0, and gradients of 0.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; each key head serves N / K consecutive query heads.
        mask: which key a query sees.
        implementation: a name of `IMPLEMENTATIONS`; a named one never falls back.
        extras: see `Extras`.

    Returns:
        [B, T, N, H] in q's dtype.

    Raises:
        ValueError: shapes do not fit, or there is no such implementation.
        NotImplementedError: the implementation lacks what is asked for.
    """
    return _attend(implementation, make_operands(q, k, v, mask, **extras))[0]


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = CAUSAL,
    implementation: str = "xla",
    **extras: Unpack[Extras],
) -> tuple[jax.Array, jax.Array]:
    """`attention` and the logarithm of the softmax's denominator, float32 [B, T, N].

    Both are differentiable. For a query that sees nothing the logarithm is -1e30 (`mask.MASKED`),
    with sinks that of its head's sink.
    """
    y, lse = _attend(implementation, make_operands(q, k, v, mask, **extras))
    if lse is None:
        raise NotImplementedError(f"{implementation} attention returns no log-sum-exp")
    return y, lse


def make_operands(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = CAUSAL,
    **extras: Unpack[Extras],
) -> Operands:
    """The record that implementations are called with, checked; see `attention` and `Extras`.

    Raises:
        ValueError: shapes do not fit.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    if k.shape != (b, s, kv, h) or v.shape != k.shape or n % kv:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    _check(mask, (b, t), (b, s))
    sinks, alibi, relative = (_float32(extras.get(name)) for name in ("sinks", "alibi", "relative"))
    for name, array in (("sinks", sinks), ("alibi", alibi)):
        if array is not None and array.shape != (n,):
            raise ValueError(f"{name} {array.shape} must have one number for each of {n} heads")
    scale, offset = extras.get("scale"), extras.get("query_offset", 0)
    if relative is not None:
        _check_relative(relative, n, max(t, s), mask, offset)
    return Operands(
        q=q,
        k=k,
        v=v,
        mask=mask,
        sinks=sinks,
        alibi=alibi,
        relative=relative,
        query_offset=offset,
        scale=h**-0.5 if scale is None else float(scale),
        softcap=extras.get("softcap"),
        softmax_dtype=jnp.dtype(extras.get("softmax_dtype", jnp.float32)),
    )


def _float32(array: Any) -> jax.Array | None:
    return None if array is None else jnp.asarray(array, jnp.float32)


def _check(mask: Mask, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    """Raises ValueError unless the mask fits queries [B, T] and keys [B, S]."""
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise ValueError("segment ids are needed for both queries and keys")
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"window {mask.window} must be at least 1")
    if not 0 <= mask.prefix <= keys[1]:
        raise ValueError(f"prefix {mask.prefix} must be between 0 and the {keys[1]} keys")
    arrays = {"query_segments": (mask.query_segments, queries)}
    arrays["key_segments"] = (mask.key_segments, keys)
    columns = mask.columns or Columns()
    if columns.lts is None and columns.lte is not None:
        raise ValueError("columns: lte needs lts")
    if columns.ute is None and columns.uts is not None:
        raise ValueError("columns: uts needs ute")
    for name in ("lts", "lte", "uts", "ute"):
        arrays[f"columns.{name}"] = (getattr(columns, name), keys)
    for name, (array, shape) in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} {array.shape} must be {shape}")


def _check_relative(
    relative: jax.Array, num_heads: int, longest: int, mask: Mask, offset: int | jax.Array
) -> None:
    heads, columns = relative.shape
    if heads != num_heads or columns % 2 == 0 or columns < 2 * longest - 1:
        raise ValueError(
            f"relative {relative.shape} must be [{num_heads}, 2 M - 1] with M of {longest} or more"
        )
    if mask.prefix or not isinstance(offset, int) or offset:
        raise ValueError("relative counts positions from the first token: no prefix, no offset")


def _attend(implementation: str, operands: Operands) -> tuple[jax.Array, jax.Array | None]:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    module = importlib.import_module(f"{__name__}.{implementation}")
    return module.attend(operands)
