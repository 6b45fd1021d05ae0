"""DeepSeek-V3 and R1 (arXiv 2412.19437): V2 with sigmoid scores, balanced by a bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import deepseek_layout, llama_layout, moe_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.moe import MoEConfig

build = Decoder

TINY = deepseek_layout.TINY | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "rope_interleave": True,
}
SIZES = {
    "671b": llama_layout.sized(
        TINY,
        (7168, 18432, 61, 128, 128),
        vocab_size=129280,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        max_position_embeddings=163840,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    )
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a DeepSeek-V3 config.json.

    Attributes:
        in_pairs: whether the rotated numbers lie in pairs in Hugging Face's tensors.
    """

    in_pairs: bool = True

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf["num_experts_per_tok"],
            expert_size=hf["moe_intermediate_size"],
            scores="sigmoid",
            renormalize=hf.get("norm_topk_prob", True),
            scale=hf.get("routed_scaling_factor", 1.0),
            correction=True,
            groups=hf["n_group"],
            kept_groups=hf["topk_group"],
            best_of_group=2,
            shared_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        )
        in_pairs = hf.get("rope_interleave", True)
        return cls(**deepseek_layout.fields(hf, moe), in_pairs=in_pairs)


def weights(config: Config) -> tuple[Weight, ...]:
    """DeepSeek's, and the numbers that balance experts."""
    name = moe_layout.LAYER + "mlp.gate.e_score_correction_bias"
    correction = Weight("layers.mlp.router.correction", name, SAME)
    return deepseek_layout.weights(config, correction, in_pairs=config.in_pairs)
