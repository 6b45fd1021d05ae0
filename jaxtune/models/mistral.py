"""Mistral: Llama with a sliding window (arXiv 2310.06825)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 7,
}
_7B = llama_layout.sized(
    TINY, (4096, 14336, 32, 32, 8), vocab_size=32000, max_position_embeddings=32768
)
# Mistral-7B v0.1 and v0.3, Mistral-Nemo, Mistral-Small-24B.
SIZES = {
    "7b-v0.1": _7B | {"sliding_window": 4096},
    "7b": _7B | {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6},
    "12b": llama_layout.sized(
        TINY,
        (5120, 14336, 40, 32, 8),
        vocab_size=131072,
        head_dim=128,
        max_position_embeddings=131072,
        sliding_window=None,
        rope_theta=1e6,
    ),
    "24b": llama_layout.sized(
        TINY,
        (5120, 32768, 40, 32, 8),
        vocab_size=131072,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=None,
        rope_theta=1e8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Mistral config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; every layer has the window, if there is one."""
        window = hf.get("sliding_window")
        types = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
        return cls(**llama_layout.fields(hf, window=window, types=types))
