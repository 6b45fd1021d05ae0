"""ELECTRA's discriminator (arXiv 2003.10555): BERT whose embeddings may be narrower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import bert_layout
from jaxtune.models.base import Weight
from jaxtune.models.encoder import Encoder, EncoderConfig
from jaxtune.models.heads import TOKEN_FORMS, Form

build = Encoder
PREFIX = "electra."

TINY = bert_layout.TINY | {
    "architectures": ["ElectraModel"],
    "model_type": "electra",
    "embedding_size": 16,
}
SIZES = {
    "14m": bert_layout.sized(TINY, 256, 12, 4, embedding_size=128),
    "110m": bert_layout.sized(TINY, 768, 12, 12, embedding_size=768),
    "335m": bert_layout.sized(TINY, 1024, 24, 16, embedding_size=1024),
}
HEADS = {
    **TOKEN_FORMS,
    "sequence_classification": Form(
        "classifier.out_proj", dense="classifier.dense", activation="gelu"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """An encoder read from an ELECTRA config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        return cls(**bert_layout.fields(hf, embedding_size=hf["embedding_size"]))


def weights(config: EncoderConfig) -> tuple[Weight, ...]:
    """Names of BERT under another prefix."""
    del config
    return bert_layout.weights(PREFIX)
