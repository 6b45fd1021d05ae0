"""Qwen 1 (arXiv 2309.16609): fused projections with a bias, half of `intermediate_size`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import concatenated, fused, linear, norm, qkv

build = Decoder

_NAMES = {
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
    "head_dim": "kv_channels",
}
TINY = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 512,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def _sized(shape: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    named = TINY | dict(zip(llama_layout.SHAPE, shape, strict=True))
    return named | {"vocab_size": 151936, "kv_channels": 128, "seq_length": 8192} | fields


SIZES = {
    "1.8b": _sized((2048, 11008, 24, 16)),
    "7b": _sized((4096, 22016, 32, 32)),
    "14b": _sized((5120, 27392, 40, 40), vocab_size=152064, seq_length=2048),
    "72b": _sized((8192, 49152, 80, 64), vocab_size=152064, seq_length=32768)
    | {"rotary_emb_base": 1000000},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Qwen config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json.

        `use_dynamic_ntk` and `use_logn_attn` change what comes after `seq_length` tokens, where
        this model ends.
        """
        hf = llama_layout.renamed(hf, _NAMES)
        hf["intermediate_size"] //= 2
        biased = not hf.get("no_bias", True)
        return cls(**llama_layout.fields(hf, qkv_bias=True, out_bias=biased, mlp_bias=biased))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """One fused tensor; w2 is the gate and w1 what it gates."""
    width, layer = config.num_heads * config.head_dim, "transformer.h.{}."
    return (
        Weight("embed.table", "transformer.wte.weight", SAME),
        *norm("layers.attn_norm", layer + "ln_1"),
        *fused(qkv(concatenated(width, width, width)), layer + "attn.c_attn"),
        *linear("layers.attn.o_proj", layer + "attn.c_proj"),
        *norm("layers.mlp_norm", layer + "ln_2"),
        *linear("layers.mlp.gate_proj", layer + "mlp.w2"),
        *linear("layers.mlp.up_proj", layer + "mlp.w1"),
        *linear("layers.mlp.down_proj", layer + "mlp.c_proj"),
        *norm("norm", "transformer.ln_f"),
        *linear("lm_head", "lm_head"),
    )
