"""Mixtral (arXiv 2401.04088): Mistral with eight experts, two for each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models import llama_layout, moe_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.moe import MoEConfig

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}
_LARGE = {"num_local_experts": 8, "rope_theta": 1e6, "max_position_embeddings": 32768}
SIZES = {
    "8x7b": llama_layout.sized(TINY, (4096, 14336, 32, 32, 8), vocab_size=32000, **_LARGE),
    "8x22b": llama_layout.sized(TINY, (6144, 16384, 56, 48, 8), vocab_size=32768, **_LARGE)
    | {"max_position_embeddings": 65536},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Mixtral config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; every layer has the window, if there is one."""
        window = hf.get("sliding_window")
        types = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf.get("num_experts_per_tok", 2),
            expert_size=hf["intermediate_size"],
            renormalize=True,
        )
        return cls(**llama_layout.fields(hf, window=window, types=types, moe=moe))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's, and those of the mixture."""
    mixture = moe_layout.LAYER + "block_sparse_moe"
    experts = moe_layout.experts(mixture, config.num_experts, names=("w1", "w3", "w2"))
    return llama_layout.weights_with(moe_layout.router(mixture), *experts)
