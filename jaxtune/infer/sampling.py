"""From logits to the next token: pure functions on logits [B, V].

The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, draw.
Every row draws with its own key, so what a row becomes does not depend on the rows beside it.

Sources: top-p, Holtzman et al. 2020 (arXiv 1904.09751); repetition penalty, CTRL, Keskar et al.
2019 (arXiv 1909.05858), on the prompt's and the answer's tokens as in transformers 5.23.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. As an argument of a jitted function it compiles anew for another
    `top_k` and when an option is switched on or off, not for other numbers.

    Attributes:
        temperature: logits are divided by it; None: the likeliest token (greedy).
        top_k: only the k likeliest tokens can be drawn; None: all.
        top_p: only the likeliest tokens that together have this probability; None: all.
        repetition_penalty: above 1, tokens that have occurred become less likely; None: off.
    """

    temperature: float | None = None
    top_k: int | None = field(default=None, metadata={"static": True})
    top_p: float | None = None
    repetition_penalty: float | None = None


def make_sampling(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """Checks a user's numbers; 0 or 1, whichever changes nothing, switches an option off.

    Raises:
        ConfigError: a number is out of range.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} - use 0 (greedy) or more")
    if top_k < 0:
        raise ConfigError(f"top_k={top_k} - use 0 (off) or more")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p={top_p} - use a number above 0, up to 1 (off)")
    if not 0.0 < repetition_penalty < float("inf"):
        raise ConfigError(f"repetition_penalty={repetition_penalty} - use 1 (off) or more")
    draws = temperature > 0.0
    return Sampling(
        temperature=temperature if draws else None,
        top_k=top_k if draws and top_k else None,
        top_p=top_p if draws and top_p < 1.0 else None,
        repetition_penalty=repetition_penalty if repetition_penalty != 1.0 else None,
    )


def sample(
    logits: jax.Array, keys: jax.Array, seen: jax.Array | None, sampling: Sampling
) -> jax.Array:
    """Chooses a token for every row.

    Args:
        logits: float32 [B, V].
        keys: a random key for each row, [B].
        seen: bool [B, V], tokens that have occurred; needed for a repetition penalty only.
        sampling: how.

    Returns:
        int32 [B].
    """
    if sampling.repetition_penalty is not None:
        assert seen is not None
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    tokens = None
    if sampling.top_k is not None:
        logits, tokens = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if tokens is not None:
        drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits [B, V] of the seen tokens by `penalty`."""
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def keep_top_p(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Sets logits [B, V] to -inf outside the smallest set of likeliest tokens that has
    probability `top_p`; tokens as likely as the last one kept are kept too.
    """
    ordered = jnp.sort(logits, axis=-1)
    # From the unlikely end, where sums of small numbers are exact enough.
    tail = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    is_kept = (tail > 1 - top_p).at[:, -1].set(True)
    lowest = jnp.where(is_kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
