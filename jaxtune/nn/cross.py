"""Attention from one sequence to another: queries of a decoder, keys and values of an encoder."""

import jax
from flax import nnx

from jaxtune.nn.attention import AttentionConfig, Segments, mixed, projections
from jaxtune.nn.cache import KeysValues, Past
from jaxtune.nn.params import Policy
from jaxtune.ops.attention import Mask


class CrossAttention(nnx.Module):
    """[B, T, D] -> [B, T, D], with keys and values of [B, S, D]; no positions enter."""

    def __init__(self, config: AttentionConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.config = config
        self.policy = policy
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(config, policy, rngs)

    def keys_values(self, memory: jax.Array) -> KeysValues:
        """Keys and values [B, S, K, H] of an encoder's output [B, S, D]."""
        shape = (*memory.shape[:2], -1, self.config.head_dim)
        return self.k_proj(memory).reshape(shape), self.v_proj(memory).reshape(shape)

    def __call__(self, x: jax.Array, across: KeysValues, segments: Segments) -> jax.Array:
        """Attends to all keys of a token's segment.

        Args:
            x: [B, T, D].
            across: keys and values [B, S, K, H].
            segments: ids of the tokens [B, T] and of the keys [B, S].
        """
        b, t, _ = x.shape
        q = self.q_proj(x).reshape(b, t, -1, self.config.head_dim)
        y, _ = mixed(
            *(q, *across, None, segments, Past()),
            policy=self.policy,
            slots=None,
            mask=Mask(causal=False),
            extras={"scale": self.config.scale},
        )
        return self.o_proj(y.reshape(b, t, -1))
