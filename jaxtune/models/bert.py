"""BERT (arXiv 1810.04805) and its many descendants, among them MiniLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import bert_layout
from jaxtune.models.base import Weight
from jaxtune.models.encoder import Encoder, EncoderConfig
from jaxtune.models.heads import TOKEN_FORMS, Form

build = Encoder
PREFIX = "bert."

TINY = bert_layout.TINY | {"architectures": ["BertModel"], "model_type": "bert"}
SIZES = {
    "22m": bert_layout.sized(TINY, 384, 6, 12),
    "33m": bert_layout.sized(TINY, 384, 12, 12),
    "110m": bert_layout.sized(TINY, 768, 12, 12),
    "335m": bert_layout.sized(TINY, 1024, 24, 16),
}
HEADS = {**TOKEN_FORMS, "sequence_classification": Form("classifier", pooler="bert.pooler.dense")}


@dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """An encoder read from a BERT config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        return cls(**bert_layout.fields(hf))


def weights(config: EncoderConfig) -> tuple[Weight, ...]:
    """Names of BERT."""
    del config
    return bert_layout.weights(PREFIX)
