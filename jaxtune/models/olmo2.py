"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP only, queries and keys normalised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import norm

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}
_LARGE = {"vocab_size": 100352, "max_position_embeddings": 4096}
SIZES = {
    "1b": llama_layout.sized(TINY, (2048, 8192, 16, 16, 16), **_LARGE),
    "7b": llama_layout.sized(TINY, (4096, 11008, 32, 32, 32), **_LARGE),
    "13b": llama_layout.sized(TINY, (5120, 13824, 40, 40, 40), **_LARGE),
    "32b": llama_layout.sized(TINY, (5120, 27648, 64, 40, 8), **_LARGE),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from an OLMo 2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        biased = hf.get("attention_bias", False)
        norms = ("attn_post_norm", "mlp_post_norm")
        return cls(
            **llama_layout.fields(
                hf, norms=norms, qk_norm="width", qkv_bias=biased, out_bias=biased
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with names for the norms."""
    del config
    layer = "model.layers.{}."
    return llama_layout.weights_with(
        *norm("layers.attn_post_norm", layer + "post_attention_layernorm"),
        *norm("layers.mlp_post_norm", layer + "post_feedforward_layernorm"),
    )
