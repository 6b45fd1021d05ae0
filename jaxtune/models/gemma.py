"""Gemma 1 (arXiv 2403.08295): scaled embeddings, norms whose factor is 1 + scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "head_dim": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_LARGE = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192}
SIZES = {
    "2b": llama_layout.sized(TINY, (2048, 16384, 18, 8, 1), **_LARGE),
    "7b": llama_layout.sized(TINY, (3072, 24576, 28, 16, 16), **_LARGE),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Gemma config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; as in transformers "gelu" means the approximation."""
        biased = hf.get("attention_bias", False)
        hf = {"tie_word_embeddings": True, **hf}
        if hf.get("hidden_act") in (None, "gelu"):
            hf["hidden_act"] = "gelu_pytorch_tanh"
        return cls(
            **llama_layout.fields(
                hf,
                norm="centered_rms",
                embed_scale=hf["hidden_size"] ** 0.5,
                qkv_bias=biased,
                out_bias=biased,
            )
        )
