"""RoBERTa (arXiv 1907.11692): BERT whose positions are counted behind the padding's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import bert_layout
from jaxtune.models.base import Weight
from jaxtune.models.encoder import Encoder, EncoderConfig
from jaxtune.models.heads import TOKEN_FORMS, Form

build = Encoder
PREFIX = "roberta."

TINY = bert_layout.TINY | {
    "architectures": ["RobertaModel"],
    "model_type": "roberta",
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
SIZES = {
    "125m": bert_layout.sized(TINY, 768, 12, 12, vocab_size=50265),
    "355m": bert_layout.sized(TINY, 1024, 24, 16, vocab_size=50265),
}
HEADS = {
    **TOKEN_FORMS,
    "sequence_classification": Form("classifier.out_proj", dense="classifier.dense"),
}


@dataclass(frozen=True, kw_only=True)
class Config(EncoderConfig):
    """An encoder read from a RoBERTa config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; the first position is the row after that of padding."""
        first = hf.get("pad_token_id", 1) + 1
        return cls(**bert_layout.fields(hf, max_positions=hf["max_position_embeddings"] - first))


def weights(config: EncoderConfig) -> tuple[Weight, ...]:
    """Names of BERT under another prefix."""
    del config
    return bert_layout.weights(PREFIX)
