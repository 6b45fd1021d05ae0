"""Qwen2-MoE and Qwen1.5-MoE (arXiv 2407.10671): Qwen2 with narrow experts and one for all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout, moe_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import linear
from jaxtune.nn.moe import MoEConfig

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SIZES = {
    "14b-a2.7b": llama_layout.sized(
        TINY,
        (2048, 5632, 24, 16, 16),
        vocab_size=151936,
        max_position_embeddings=8192,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "57b-a14b": llama_layout.sized(
        TINY,
        (3584, 18944, 28, 28, 4),
        vocab_size=151936,
        max_position_embeddings=131072,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Qwen2-MoE config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; of the first `max_window_layers`, every other has the window."""
        moe_layout.require_all_sparse(hf)
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
        last = hf.get("max_window_layers", 28) if window else 0
        types = [
            "sliding_attention" if i < last and i % 2 == 0 else "full_attention"
            for i in range(hf["num_hidden_layers"])
        ]
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf["num_experts_per_tok"],
            expert_size=hf["moe_intermediate_size"],
            renormalize=hf.get("norm_topk_prob", False),
            shared_size=hf["shared_expert_intermediate_size"],
            shared_gate=True,
        )
        changes = {"qkv_bias": hf.get("qkv_bias", True), "moe": moe}
        return cls(**llama_layout.fields(hf, window=window, types=types, **changes))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's, and those of the mixture."""
    mixture = moe_layout.LAYER + "mlp"
    return llama_layout.weights_with(
        moe_layout.router(mixture),
        *moe_layout.experts(mixture, config.num_experts),
        *moe_layout.shared_expert(f"{mixture}.shared_expert"),
        *linear("layers.mlp.shared_expert_gate", f"{mixture}.shared_expert_gate"),
    )
