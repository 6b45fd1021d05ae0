"""What the loss is, apart from how it is computed: its options and formulas."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Logits:
    """How logits come from the product p = x w: cap * tanh(scale * p / cap).

    Attributes:
        scale: factor of the product (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: bound of the logits (Gemma 2, arXiv 2408.00118, section 2); None: no bound.
    """

    scale: float = 1.0
    softcap: float | None = None

    def of(self, products: jax.Array) -> jax.Array:
        """The logits of products x w."""
        logits = products * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Penalties:
    """What is added to -log p(target).

    Attributes:
        z_loss: coefficient of logsumexp(logits)^2 (PaLM, arXiv 2204.02311, section 5).
        label_smoothing: share e of the target taken from the true token and spread evenly over the
            vocabulary, as in torch.nn.functional.cross_entropy:
            (1 - e) * -log p(target) + e * mean over v of -log p(v).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0


PLAIN, NO_PENALTIES = Logits(), Penalties()


@dataclass(frozen=True)
class Form:
    """Everything static about the loss.

    Attributes:
        transposed: the output matrix is [V, D] instead of [D, V].
        dtype: logits are rounded to it.
        logits, penalties: see there.
        vocab: V of the whole matrix, of which a shard may see a part.
        axes: mesh axes over which the vocabulary is sharded (inside shard_map).
    """

    transposed: bool
    dtype: jnp.dtype
    logits: Logits
    penalties: Penalties
    vocab: int
    axes: tuple[str, ...] = ()

    def to_logits(self, products: jax.Array) -> jax.Array:
        """float32 logits of float32 products x w."""
        return self.logits.of(products).astype(self.dtype).astype(jnp.float32)

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """d logits / d products."""
        scale, cap = self.logits.scale, self.logits.softcap
        return scale if cap is None else scale - (scale / cap**2) * logits * logits

    def losses(self, sums: "Sums") -> jax.Array:
        """Loss of each token."""
        smoothing, lse = self.penalties.label_smoothing, sums.lse
        losses = lse - (1 - smoothing) * sums.at_target
        if smoothing:
            losses -= smoothing / self.vocab * sums.logits
        return losses + self.penalties.z_loss * lse * lse

    def combine(
        self, top: jax.Array, total: jax.Array, at_target: jax.Array, logits: jax.Array
    ) -> tuple["Sums", jax.Array]:
        """Sums over the whole vocabulary from those of this shard.

        Args:
            top: this shard's largest logit [N].
            total: its sum of exp(logit - top).
            at_target: the target's logit, 0 where the target is in another shard.
            logits: the sum of its logits.

        Returns:
            The sums, and the factor p(v) / (exp(logit v - top) / total) of this shard's entries.
        """
        highest = jax.lax.pmax(top, self.axes) if self.axes else top
        share = total * jnp.exp(top - highest)
        sums = (share, at_target, logits)
        all_shares, at_target, logits = jax.lax.psum(sums, self.axes) if self.axes else sums
        lse = jnp.log(all_shares) + highest
        return Sums(lse, highest, at_target, logits), share / all_shares


class Sums(NamedTuple):
    """Per token [N], over the whole vocabulary: all that the loss is made of."""

    lse: jax.Array
    top: jax.Array
    at_target: jax.Array
    logits: jax.Array  # their sum


class Parts(NamedTuple):
    """What an implementation returns for the N tokens of a shard, of which `count` matter.

    Attributes:
        losses: float32 [N], not yet weighted; undefined beyond `count`.
        correct: bool [N]: the target has the largest logit (ties count).
        dx: [N, D], gradient of the weighted sum of losses, of this vocabulary shard's part; zero
            where the weight is; None where not asked for.
        dw: like w; None where not asked for.
    """

    losses: jax.Array
    correct: jax.Array
    dx: jax.Array | None
    dw: jax.Array | None
