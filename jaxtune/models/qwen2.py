"""Qwen2, Qwen2.5 and QwQ: Llama with biases on queries, keys and values (arXiv 2407.10671)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
_LARGE = {"vocab_size": 152064, "max_position_embeddings": 131072}
_SMALL = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
# Qwen2.5.
SIZES = {
    "0.5b": llama_layout.sized(TINY, (896, 4864, 24, 14, 2), **_SMALL),
    "1.5b": llama_layout.sized(TINY, (1536, 8960, 28, 12, 2), **_SMALL),
    "3b": llama_layout.sized(TINY, (2048, 11008, 36, 16, 2), **_SMALL),
    "7b": llama_layout.sized(TINY, (3584, 18944, 28, 28, 4), **_LARGE),
    "14b": llama_layout.sized(TINY, (5120, 13824, 48, 40, 8), **_LARGE, rms_norm_eps=1e-5),
    "32b": llama_layout.sized(TINY, (5120, 27648, 64, 40, 8), **_LARGE, rms_norm_eps=1e-5),
    "72b": llama_layout.sized(TINY, (8192, 29568, 80, 64, 8), **_LARGE, rms_norm_eps=1e-5),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Qwen2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        windows = llama_layout.late_windows(hf)
        return cls(**llama_layout.fields(hf, **windows, qkv_bias=True))
