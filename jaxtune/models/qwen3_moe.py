"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with 128 narrow experts, eight for each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout, moe_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.moe import MoEConfig

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 12,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _sized(shape: tuple[int, ...], moe_intermediate_size: int) -> dict[str, Any]:
    return llama_layout.sized(
        TINY,
        shape,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=moe_intermediate_size,
    )


SIZES = {
    "30b-a3b": _sized((2048, 6144, 48, 32, 4), 768),
    "235b-a22b": _sized((4096, 12288, 94, 64, 4), 1536),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Qwen3-MoE config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        moe_layout.require_all_sparse(hf)
        biased = hf.get("attention_bias", False)
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf["num_experts_per_tok"],
            expert_size=hf["moe_intermediate_size"],
            renormalize=hf.get("norm_topk_prob", False),
        )
        window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
        types = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
        changes = {"qkv_bias": biased, "out_bias": biased, "qk_norm": "head", "moe": moe}
        return cls(**llama_layout.fields(hf, window=window, types=types, **changes))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's, and those of the mixture."""
    mixture = moe_layout.LAYER + "mlp"
    experts = moe_layout.experts(mixture, config.num_experts)
    return llama_layout.weights_with(moe_layout.router(mixture), *experts)
