"""T5 (arXiv 1910.10683), its version 1.1 and Flan-T5 (arXiv 2210.11416): encoder and decoder.

The first version has plain MLPs and a head tied to the embedding, behind hidden states divided by
sqrt(D); later ones have gates and a head of their own. transformers 5 writes the division as
`scale_decoder_outputs`; before, it followed from the tie.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import t5_layout
from jaxtune.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

build = EncoderDecoder
weights = t5_layout.weights

TINY = t5_layout.TINY
_GATED = t5_layout.gated_sizes()
SIZES = {
    "small": t5_layout.sized(512, 64, 2048, 6, 8),
    "base": t5_layout.sized(768, 64, 3072, 12, 12),
    "large": t5_layout.sized(1024, 64, 4096, 24, 16),
    "3b": t5_layout.sized(1024, 128, 16384, 24, 32),
    "11b": t5_layout.sized(1024, 128, 65536, 24, 128),
    **{f"v1_1-{name}": fields for name, fields in _GATED.items()},
    **{f"flan-{name}": fields for name, fields in _GATED.items()},
}
HEADS: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Config(EncoderDecoderConfig):
    """An encoder and decoder read from a T5 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        tied = hf.get("tie_word_embeddings", True)
        return cls(**t5_layout.fields(hf, scaled=hf.get("scale_decoder_outputs", tied)))
