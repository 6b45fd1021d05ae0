"""Llama 1 to 3.x and the many models that are Llama under another name (SmolLM, TinyLlama, Yi
...).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _llama3(shape: tuple[int, ...], *, factor: float, tied: bool) -> dict[str, Any]:
    return llama_layout.sized(
        TINY,
        (*shape, 8),
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=tied,
    )


# Llama 3.2 (1b, 3b) and 3.1, from their config.json. 104b has the matrices of Command R+
# (c4ai-command-r-plus) in Llama's order.
SIZES = {
    "1b": _llama3((2048, 8192, 16, 32), factor=32.0, tied=True),
    "3b": _llama3((3072, 8192, 28, 24), factor=32.0, tied=True),
    "8b": _llama3((4096, 14336, 32, 32), factor=8.0, tied=False),
    "70b": _llama3((8192, 28672, 80, 64), factor=8.0, tied=False),
    "104b": _llama3((12288, 33792, 64, 96), factor=8.0, tied=True) | {"vocab_size": 256000},
    "405b": _llama3((16384, 53248, 126, 128), factor=8.0, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Llama config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        biased = hf.get("attention_bias", False)
        mlp_bias = hf.get("mlp_bias", False)
        return cls(**llama_layout.fields(hf, qkv_bias=biased, out_bias=biased, mlp_bias=mlp_bias))
