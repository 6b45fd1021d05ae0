"""GLM-4-9B as transformers has it (arXiv 2406.12793): half of each head is rotated, in pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import fused, gate_up, paired_heads

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "head_dim": 16,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
}
_LARGE = {"vocab_size": 151552, "head_dim": 128, "max_position_embeddings": 131072}
SIZES = {
    "9b": llama_layout.sized(TINY, (4096, 13696, 40, 32, 2), **_LARGE),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a GLM config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        share = llama_layout.partial_rotary(hf, 0.5)
        biased = hf.get("attention_bias", True)
        return cls(**llama_layout.fields(hf, rotary=share, qkv_bias=biased))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with pairs of rotated numbers side by side, and a fused MLP."""
    layer = "model.layers.{}."
    return llama_layout.weights_with(
        *paired_heads(config, layer + "self_attn."),
        *fused(gate_up(config.intermediate_size), layer + "mlp.gate_up_proj"),
    )
