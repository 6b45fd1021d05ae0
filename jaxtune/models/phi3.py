"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219): queries, keys and values are one tensor, and so are
the MLP's gate and up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import concatenated, fused, gate_up, qkv

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 512,
}
# Phi-3-mini-4k (3.8b), Phi-3-medium-4k and Phi-4 (both 14b).
SIZES = {
    "3.8b": llama_layout.sized(TINY, (3072, 8192, 32, 32, 32), vocab_size=32064)
    | {"max_position_embeddings": 4096, "sliding_window": 2047},
    "14b": llama_layout.sized(TINY, (5120, 17920, 40, 40, 10), vocab_size=32064)
    | {"max_position_embeddings": 4096, "sliding_window": 2047},
    "4-14b": llama_layout.sized(TINY, (5120, 17920, 40, 40, 10), vocab_size=100352)
    | {"max_position_embeddings": 16384, "rope_theta": 250000.0},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Phi-3 or Phi-4 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; of the rotations "su" and "yarn" mean "longrope"."""
        hf = {**hf}
        for name in ("rope_scaling", "rope_parameters"):
            options = hf.get(name) or {}
            if (options.get("rope_type") or options.get("type")) in ("su", "yarn"):
                hf[name] = {**options, "rope_type": "longrope"}
        window = hf.get("sliding_window")
        types = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
        share = llama_layout.partial_rotary(hf)
        return cls(**llama_layout.fields(hf, window=window, types=types, rotary=share))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with two fused tensors."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = "model.layers.{}."
    return llama_layout.weights_with(
        *fused(qkv(concatenated(queries, keys, keys)), layer + "self_attn.qkv_proj"),
        *fused(gate_up(config.intermediate_size), layer + "mlp.gate_up_proj"),
    )
