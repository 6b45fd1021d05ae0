"""InternLM 2 and 2.5 (arXiv 2403.17297): Llama with fused heads and names of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import by_key_head, fused, linear, norm, qkv

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
}
_LARGE = {"vocab_size": 92544, "max_position_embeddings": 32768, "rope_theta": 1e6}
SIZES = {
    "1.8b": llama_layout.sized(TINY, (2048, 8192, 24, 16, 8), **_LARGE),
    "7b": llama_layout.sized(TINY, (4096, 14336, 32, 32, 8), **_LARGE),
    "20b": llama_layout.sized(TINY, (6144, 16384, 48, 48, 8), **_LARGE),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from an InternLM 2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        biased = hf.get("bias", False)
        return cls(**llama_layout.fields(hf, qkv_bias=biased, out_bias=biased))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Each key head follows the queries that see it."""
    layer = "model.layers.{}."
    heads = by_key_head(config.num_heads, config.num_kv_heads, config.head_dim)
    return (
        Weight("embed.table", "model.tok_embeddings.weight", SAME),
        *norm("layers.attn_norm", layer + "attention_norm"),
        *fused(qkv(heads), layer + "attention.wqkv"),
        *linear("layers.attn.o_proj", layer + "attention.wo"),
        *norm("layers.mlp_norm", layer + "ffn_norm"),
        *linear("layers.mlp.gate_proj", layer + "feed_forward.w1"),
        *linear("layers.mlp.up_proj", layer + "feed_forward.w3"),
        *linear("layers.mlp.down_proj", layer + "feed_forward.w2"),
        *norm("norm", "model.norm"),
        *linear("lm_head", "output"),
    )
