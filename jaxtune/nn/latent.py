"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1).

Keys and values of all heads are made of one latent vector of each token; only a part of each head
is rotated, and that of the keys is the same for all heads. Here heads begin with the rotated part.
Values are padded to the size of keys, so every kernel, mesh and cache works as for other attention;
the cache holds expanded keys and values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import ops
from jaxtune.nn.attention import AttentionConfig, Rotation, Segments, mixed
from jaxtune.nn.cache import KeysValues, Past
from jaxtune.nn.linear import Linear
from jaxtune.nn.norm import RMSNorm
from jaxtune.nn.params import Policy
from jaxtune.ops.attention import Mask

_EPS = 1e-6  # of the latent vectors' norms, whatever the model's


class LatentAttention(nnx.Module):
    """[B, T, D] -> [B, T, D] with N heads of queries and keys of size H."""

    def __init__(self, config: AttentionConfig, *, policy: Policy, rngs: nnx.Rngs):
        c, latent = config, config.latent
        assert latent is not None
        make = functools.partial(Linear, policy=policy, rngs=rngs)
        norm = functools.partial(RMSNorm, eps=_EPS, policy=policy, axis="latent")
        self.config = c
        self.latent = latent
        self.policy = policy
        queries = c.num_heads * c.head_dim
        self.q_proj: Any = nnx.data(None)
        self.q_a_proj: Any = nnx.data(None)
        if latent.query_rank is None:
            self.q_proj = make(c.hidden_size, queries, axes=("embed", "heads"))
        else:
            rank = latent.query_rank
            bias = c.qkv_bias
            self.q_a_proj = make(c.hidden_size, rank, axes=("embed", "latent"), bias=bias)
            self.q_a_norm = norm(rank)
            self.q_b_proj = make(rank, queries, axes=("latent", "heads"))
        wide = c.num_heads * (c.head_dim - latent.rope_dim + latent.value_dim)
        narrow = functools.partial(make, axes=("embed", "latent"), bias=c.qkv_bias)
        self.kv_a_proj = narrow(c.hidden_size, latent.rank)
        self.k_rope_proj = narrow(c.hidden_size, latent.rope_dim)
        self.kv_a_norm = norm(latent.rank)
        self.kv_b_proj = make(latent.rank, wide, axes=("latent", "heads"))
        out = c.num_heads * latent.value_dim
        self.o_proj = make(out, c.hidden_size, axes=("heads", "embed"), bias=c.out_bias)

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        segments: Segments,
        past: Past = Past(),  # noqa: B008
        *,
        slots: jax.Array | None = None,
        window: int | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Attends causally within segments; arguments and results are those of `Attention`."""
        c, latent = self.config, self.latent
        b, t, _ = x.shape
        heads = (b, t, c.num_heads, -1)
        if self.q_proj is None:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        k_rope = ops.rotate(self.k_rope_proj(x)[:, :, None], *rope)
        expanded = self.kv_b_proj(self.kv_a_norm(self.kv_a_proj(x))).reshape(heads)
        k, v = jnp.split(expanded, [c.head_dim - latent.rope_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:3], latent.rope_dim))
        y, new = mixed(
            ops.rotate(q.reshape(heads), *rope),
            jnp.concatenate([k_rope, k], axis=-1),
            jnp.pad(v, ((0, 0),) * 3 + ((0, c.head_dim - latent.value_dim),)),
            None,
            segments,
            past,
            policy=self.policy,
            slots=slots,
            mask=Mask(window=window),
            extras={"scale": c.scale, "softcap": None, "alibi": None, "sinks": None},
        )
        return self.o_proj(y[..., : latent.value_dim].reshape(b, t, -1)), new
