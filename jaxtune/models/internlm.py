"""InternLM 1: Llama with biases on all four projections of attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig

weights = llama_layout.weights
build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["InternLMForCausalLM"],
    "model_type": "internlm",
    "num_key_value_heads": 4,
    "bias": True,
    "rotary": {"base": 10000, "type": "dynamic"},
}
SIZES = {
    "7b": llama_layout.sized(TINY, (4096, 11008, 32, 32, 32), vocab_size=103168)
    | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "20b": llama_layout.sized(TINY, (5120, 13824, 60, 40, 40), vocab_size=103168)
    | {"max_position_embeddings": 4096, "bias": False},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from an InternLM config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; its `rotary` says what `rope_scaling` says elsewhere."""
        rotary = {"base": 10000, **(hf.get("rotary") or {})}
        scaling = {"type": rotary.get("type", "default"), "rope_theta": rotary["base"]}
        scaling = {"rope_scaling": scaling | {"factor": rotary.get("scaling_factor", 1.0)}}
        biased = hf.get("bias", True)
        return cls(**llama_layout.fields({**hf, **scaling}, qkv_bias=biased, out_bias=biased))
