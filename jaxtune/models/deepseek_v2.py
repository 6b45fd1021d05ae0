"""DeepSeek-V2 (arXiv 2405.04434): latent attention, narrow experts in groups beside shared ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models import deepseek_layout, llama_layout, moe_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.moe import MoEConfig

build = Decoder

TINY = deepseek_layout.TINY | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
_PUBLISHED = {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "max_position_embeddings": 163840,
    "rope_scaling": _YARN,
}
SIZES = {
    "16b-lite": llama_layout.sized(
        TINY,
        (2048, 10944, 27, 16, 16),
        q_lora_rank=None,
        n_routed_experts=64,
        moe_intermediate_size=1408,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        **_PUBLISHED,
    ),
    "236b": llama_layout.sized(
        TINY,
        (5120, 12288, 60, 128, 128),
        q_lora_rank=1536,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
        **_PUBLISHED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a DeepSeek-V2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        methods = {
            "greedy": (1, 1),
            "group_limited_greedy": (hf.get("n_group"), hf.get("topk_group")),
        }
        method = hf.get("topk_method", "greedy")
        if method not in methods:
            raise WeightError(f"config.json: topk_method {method!r} is not supported")
        groups, kept = methods[method]
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf["num_experts_per_tok"],
            expert_size=hf["moe_intermediate_size"],
            scale=hf.get("routed_scaling_factor", 1.0),
            groups=groups or 1,
            kept_groups=kept or 1,
            shared_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        )
        return cls(**deepseek_layout.fields(hf, moe))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """DeepSeek's."""
    return deepseek_layout.weights(config, in_pairs=True)
