"""Baichuan 1 and 2 (arXiv 2309.10305): fused projections; ALiBi in 13B, a normalised head in 2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import concatenated, fused, qkv
from jaxtune.nn.alibi import alibi_slopes
from jaxtune.nn.params import Policy

TINY = llama_layout.TINY | {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "num_key_value_heads": 4,
    "z_loss_weight": 0,
}


def _sized(shape: tuple[int, ...], vocab: int, **fields: Any) -> dict[str, Any]:
    *_, heads = shape
    common = {"vocab_size": vocab, "rms_norm_eps": 1e-6}
    named = llama_layout.sized(TINY, (*shape, heads), **common, **fields)
    return {name: value for name, value in named.items() if value is not None}


_WIDTH_13B, _VOCABULARY_2 = 5120, 125696
# Of 13B config.json gives model_max_length alone.
_13B: dict[str, Any] = {"model_max_length": 4096, "max_position_embeddings": None}
SIZES = {
    "7b": _sized((4096, 11008, 32, 32), 64000, z_loss_weight=None, max_position_embeddings=4096),
    "13b": _sized((_WIDTH_13B, 13696, 40, 40), 64000, z_loss_weight=None, **_13B),
    "2-7b": _sized((4096, 11008, 32, 32), _VOCABULARY_2, max_position_embeddings=4096),
    "2-13b": _sized((_WIDTH_13B, 13696, 40, 40), _VOCABULARY_2, **_13B),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Baichuan config.json.

    Attributes:
        normalized_head: the output matrix has rows of length 1.
    """

    normalized_head: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json.

        All versions have one model_type. 13B is known by its width or, as its config.json says
        nothing of positions but model_max_length, by that; Baichuan 2 by its vocabulary, which
        may have been enlarged, or by z_loss_weight.
        """
        changes: dict[str, Any] = {}
        if hf["hidden_size"] == _WIDTH_13B or "max_position_embeddings" not in hf:
            changes["max_positions"] = hf["model_max_length"]
            changes["alibi"] = alibi_slopes(hf["num_attention_heads"])
            changes["layer_kinds"] = llama_layout.layer_kinds(hf, None)
        return cls(
            normalized_head=hf["vocab_size"] >= _VOCABULARY_2 or "z_loss_weight" in hf,
            **llama_layout.fields(hf, **changes),
        )


def normalized(weight: jax.Array) -> jax.Array:
    """A matrix [D, V] with columns of length 1, at least 1e-12 before."""
    length = jnp.linalg.norm(weight.astype(jnp.float32), axis=0, keepdims=True)
    return (weight / jnp.maximum(length, 1e-12)).astype(weight.dtype)


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model."""
    if config.normalized_head:
        return Decoder(config, policy, rngs, output=normalized)
    return Decoder(config, policy, rngs)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with a fused tensor."""
    width = config.hidden_size
    heads = qkv(concatenated(width, width, width))
    return llama_layout.weights_with(*fused(heads, "model.layers.{}.self_attn.W_pack"))
