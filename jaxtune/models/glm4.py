"""GLM-4-0414: GLM with norms after attention and MLP too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import fused, gate_up, norm, paired_heads

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "head_dim": 16,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
}
_LARGE = {"vocab_size": 151552, "head_dim": 128, "max_position_embeddings": 32768}
SIZES = {
    "9b": llama_layout.sized(TINY, (4096, 13696, 40, 32, 2), **_LARGE),
    "32b": llama_layout.sized(TINY, (6144, 23040, 61, 48, 8), **_LARGE)
    | {"attention_bias": False, "rms_norm_eps": 1e-5},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a GLM-4-0414 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        share = llama_layout.partial_rotary(hf, 0.5)
        norms = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
        biased = hf.get("attention_bias", True)
        return cls(**llama_layout.fields(hf, rotary=share, qkv_bias=biased, norms=norms))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with pairs of rotated numbers side by side, and a fused MLP."""
    layer = "model.layers.{}."
    return llama_layout.weights_with(
        *paired_heads(config, layer + "self_attn."),
        *fused(gate_up(config.intermediate_size), layer + "mlp.gate_up_proj"),
        *norm("layers.attn_post_norm", layer + "post_self_attn_layernorm"),
        *norm("layers.mlp_post_norm", layer + "post_mlp_layernorm"),
    )
