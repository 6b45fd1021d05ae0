"""Qwen3: Llama with queries and keys that are normalised head by head (arXiv 2505.09388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 12,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


def _sized(shape: tuple[int, ...], *, tied: bool) -> dict[str, Any]:
    return llama_layout.sized(
        TINY,
        shape,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


SIZES = {
    "0.6b": _sized((1024, 3072, 28, 16, 8), tied=True),
    "1.7b": _sized((2048, 6144, 28, 16, 8), tied=True),
    "4b": _sized((2560, 9728, 36, 32, 8), tied=True),
    "8b": _sized((4096, 12288, 36, 32, 8), tied=False),
    "14b": _sized((5120, 17408, 40, 40, 8), tied=False),
    "32b": _sized((5120, 25600, 64, 64, 8), tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Qwen3 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        biased = hf.get("attention_bias", False)
        changes = {"qkv_bias": biased, "out_bias": biased, "qk_norm": "head"}
        return cls(**llama_layout.fields(hf, **llama_layout.late_windows(hf), **changes))
