"""gpt-oss (arXiv 2508.10925): sinks in attention, windows in turn, experts with biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.models import llama_layout, moe_layout
from jaxtune.models.base import SAME, TRANSPOSE, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.mlp import ClampedGate
from jaxtune.nn.moe import MoEConfig

build = Decoder

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
TINY = llama_layout.TINY | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 12,
    "intermediate_size": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_scaling": _YARN | {"original_max_position_embeddings": 64},
    "rope_theta": 150000.0,
    "attention_bias": True,
}


def _sized(num_layers: int, num_local_experts: int) -> dict[str, Any]:
    return llama_layout.sized(
        TINY,
        (2880, 2880, num_layers, 64, 8),
        head_dim=64,
        vocab_size=201088,
        max_position_embeddings=131072,
        num_local_experts=num_local_experts,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=None,
        rope_scaling=_YARN,
    )


SIZES = {"20b": _sized(24, 32), "120b": _sized(36, 128)}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a gpt-oss config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; where it does not say so, every other layer has the window."""
        moe = MoEConfig(
            num_experts=moe_layout.num_experts(hf),
            top_k=hf["num_experts_per_tok"],
            expert_size=hf["intermediate_size"],
            renormalize=True,
            bias=True,
            clamped=ClampedGate(hf.get("swiglu_alpha", 1.702), hf.get("swiglu_limit", 7.0)),
        )
        kinds = ("sliding_attention", "full_attention")
        types = [kinds[i % 2] for i in range(hf["num_hidden_layers"])]
        biased = hf.get("attention_bias", True)
        return cls(
            **llama_layout.fields(
                hf,
                window=hf.get("sliding_window", 128),
                types=types,
                qkv_bias=biased,
                out_bias=biased,
                has_sinks=True,
                moe=moe,
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's; experts of a layer in one tensor, gate and up in turn."""
    ours, theirs = "layers.mlp.experts", moe_layout.LAYER + "mlp.experts"
    router = moe_layout.LAYER + "mlp.router"
    columns = np.arange(2 * config.intermediate_size).reshape(-1, 2).T
    fused = (
        Weight(f"{ours}.{name}.{leaf}", f"{theirs}.gate_up_proj{end}", SAME, part)
        for leaf, end in (("kernel", ""), ("bias", "_bias"))
        for name, part in zip(("gate_proj", "up_proj"), columns, strict=True)
    )
    return llama_layout.weights_with(
        Weight("layers.attn.sinks", moe_layout.LAYER + "self_attn.sinks", SAME),
        Weight("layers.mlp.router.weight", f"{router}.weight", TRANSPOSE),
        Weight("layers.mlp.router.bias", f"{router}.bias", SAME),
        *fused,
        Weight(f"{ours}.down_proj.kernel", f"{theirs}.down_proj", SAME),
        Weight(f"{ours}.down_proj.bias", f"{theirs}.down_proj_bias", SAME),
    )
