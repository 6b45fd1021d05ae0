"""mT5 (arXiv 2010.11934): T5 version 1.1 in 101 languages, with a vocabulary of 250112."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import t5_layout
from jaxtune.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

build = EncoderDecoder
weights = t5_layout.weights

_OWN = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
TINY = t5_layout.TINY | t5_layout.GATED | _OWN
SIZES = t5_layout.gated_sizes(**_OWN, vocab_size=250112)
HEADS: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Config(EncoderDecoderConfig):
    """An encoder and decoder read from an mT5 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; hidden states are never divided, tied or not."""
        return cls(**t5_layout.fields(hf, scaled=False))
