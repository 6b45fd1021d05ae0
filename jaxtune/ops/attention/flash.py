"""The differentiable function around an implementation's forward and backward pass.

What is kept for the backward pass is the operands, the output and the log-sum-exp of every query,
as in FlashAttention-2 (arXiv 2307.08691, algorithm 2). With P = exp(scores - lse) and the
cotangents dy of the output and dlse of the log-sum-exp:

    delta = rowsum(dy * y) - dlse
    dscores = P * (dy v^T - delta)         dv = P^T dy
    dsink = -sum over queries of exp(sink - lse) * delta

because the derivative of lse to the scores is P again and a sink is a score whose value is zero.
Delta and the gradient of the sinks are computed here, once for all implementations.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxtune.ops.attention.mask import Mask


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Operands:
    """What an implementation is called with; see `ops.attention` for what each attribute means.

    Attributes:
        q: [B, T, N, H].
        k, v: [B, S, K, H].
        mask: which keys a query sees.
        sinks, alibi: float32 [N] or None.
        relative: float32 [N, 2M - 1] or None.
        query_offset: an int if it is known when tracing, else an int32 scalar.
        scale, softcap, softmax_dtype: static.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    sinks: jax.Array | None
    alibi: jax.Array | None
    relative: jax.Array | None
    query_offset: int | jax.Array
    scale: float
    softcap: float | None
    softmax_dtype: DTypeLike

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """An offset that is an int stays one, so that blocks can be skipped while tracing."""
        known = self.query_offset if isinstance(self.query_offset, int) else None
        offset = self.query_offset if known is None else None
        arrays = (self.q, self.k, self.v, self.mask, self.sinks, self.alibi, self.relative)
        return (*arrays, offset), (known, self.scale, self.softcap, self.softmax_dtype)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> "Operands":
        q, k, v, mask, sinks, alibi, relative, offset = children
        known, scale, softcap, softmax_dtype = static
        offset = offset if known is None else known
        return cls(q, k, v, mask, sinks, alibi, relative, offset, scale, softcap, softmax_dtype)


@dataclasses.dataclass(frozen=True)
class Passes:
    """The two passes of an implementation; hashed by the identity of its functions.

    Attributes:
        forward: operands -> (y [B, T, N, H] in q's dtype, lse float32 [B, T, N]). A query that sees
            nothing gets y = 0 and lse = `mask.MASKED` (with sinks: lse = its head's sink).
        backward: operands, lse, dy [B, T, N, H], delta float32 [B, T, N] -> (dq, dk, dv) in the
            dtypes of q, k and v, and behind them that of `relative`, if there is one.
    """

    forward: Callable[[Operands], tuple[jax.Array, jax.Array]]
    backward: Callable[[Operands, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]


def refuse(implementation: str, operands: Operands, *features: str) -> None:
    """Raises NotImplementedError if a call has one of the features that an implementation lacks.

    Args:
        implementation: its name, for the message.
        operands: the call.
        features: of "window", "prefix", "segments", "columns", "softcap", "sinks", "alibi",
            "relative", "query_offset" and "lengths" (other keys than the queries' tokens).
    """
    mask, offset = operands.mask, operands.query_offset
    has = {
        "window": mask.window is not None,
        "prefix": mask.prefix > 0,
        "segments": mask.query_segments is not None,
        "columns": mask.columns is not None,
        "softcap": operands.softcap is not None,
        "sinks": operands.sinks is not None,
        "alibi": operands.alibi is not None,
        "relative": operands.relative is not None,
        "query_offset": not isinstance(offset, int) or offset != 0,
        "lengths": operands.q.shape[1] != operands.k.shape[1],
    }
    found = [feature for feature in features if has[feature]]
    if found:
        raise NotImplementedError(f"{implementation} attention does not support {', '.join(found)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(passes: Passes, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp float32 [B, T, N], differentiable in the operands' arrays
    but for masks, slopes and offsets.

    Both carry the checkpoint name "attention": a remat policy that saves the name spares the
    forward pass when the backward pass runs.
    """
    return passes.forward(operands)


def _forward(passes: Passes, operands: Operands) -> tuple:
    y, lse = passes.forward(operands)
    y, lse = checkpoint_name(y, "attention"), checkpoint_name(lse, "attention")
    return (y, lse), (operands, y, lse)


def _backward(passes: Passes, saved: tuple, cotangents: tuple) -> tuple[Operands]:
    operands, y, lse = saved
    dy, dlse = cotangents
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1) - dlse
    dq, dk, dv, *rest = passes.backward(operands, lse, dy, delta)
    sinks = operands.sinks
    if sinks is not None:
        sinks = -(jnp.exp(sinks - lse) * delta).sum(axis=(0, 1)).astype(sinks.dtype)
    known = isinstance(operands.query_offset, int)
    return (
        dataclasses.replace(
            operands,
            q=dq,
            k=dk,
            v=dv,
            sinks=sinks,
            mask=None,  # None: no gradient
            alibi=None,
            relative=rest[0] if rest else None,
            query_offset=operands.query_offset if known else None,
        ),
    )


attend.defvjp(_forward, _backward)
