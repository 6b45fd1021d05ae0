"""InternLM 3: Llama with optional biases, of queries, keys and values apart from the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "head_dim": 12,
    "qkv_bias": True,
    "bias": False,
}
SIZES = {
    "8b": llama_layout.sized(TINY, (4096, 10240, 48, 32, 2), vocab_size=128512)
    | {"head_dim": 128, "qkv_bias": False, "max_position_embeddings": 32768, "rope_theta": 5e7},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from an InternLM 3 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json, with the names of the published code or of transformers."""
        biased = hf.get("bias", hf.get("attention_bias", False))
        return cls(
            **llama_layout.fields(
                hf,
                qkv_bias=hf.get("qkv_bias", hf.get("attention_bias", False)),
                out_bias=biased,
                mlp_bias=hf.get("bias", hf.get("mlp_bias", False)),
            )
        )
