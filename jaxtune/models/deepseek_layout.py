"""Tensor names and config fields that DeepSeek-V2 and V3 share.

Hugging Face's heads end with the part that is rotated, in pairs; ours begin with it, in two halves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout, moe_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.tables import in_halves, linear, norm
from jaxtune.nn.attention import LatentConfig
from jaxtune.nn.moe import MoEConfig
from jaxtune.nn.rope import Rope

TINY = llama_layout.TINY | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
}


def fields(hf: Mapping[str, Any], moe: MoEConfig) -> dict[str, Any]:
    """The fields of a `DecoderConfig` from a config.json of DeepSeek.

    Raises:
        WeightError: of what is not supported, the first.
        KeyError: a field is missing.
    """
    if hf.get("moe_layer_freq", 1) != 1:
        raise WeightError("config.json: moe_layer_freq other than 1 is not supported")
    rotated = hf["qk_rope_head_dim"]
    head_dim = hf["qk_nope_head_dim"] + rotated
    rope = llama_layout.rope_from_hf(hf, rotated)
    kinds = llama_layout.layer_kinds(hf, rope)
    dense = hf.get("first_k_dense_replace", 0)
    biased = hf.get("attention_bias", False)
    return llama_layout.fields(
        hf,
        layer_kinds=tuple(
            dataclasses.replace(kind, dense=i < dense) for i, kind in enumerate(kinds)
        ),
        head_dim=head_dim,
        num_kv_heads=hf["num_attention_heads"],
        scale=head_dim**-0.5 * _softmax_factor(rope),
        latent=LatentConfig(
            query_rank=hf.get("q_lora_rank"),
            rank=hf["kv_lora_rank"],
            rope_dim=rotated,
            value_dim=hf["v_head_dim"],
        ),
        qkv_bias=biased,
        out_bias=biased,
        moe=moe,
    )


def _softmax_factor(rope: Rope) -> float:
    """What YaRN with `mscale_all_dim` multiplies the scores with."""
    if rope.type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * np.log(rope.factor) + 1.0) ** 2


def weights(config: DecoderConfig, *rows: Weight, in_pairs: bool) -> tuple[Weight, ...]:
    """The weight table.

    Args:
        config: the shapes.
        rows: of the family alone.
        in_pairs: whether Hugging Face's rotated numbers lie in pairs.
    """
    latent = config.latent
    assert latent is not None
    ours, theirs = "layers.attn", moe_layout.LAYER + "self_attn"
    mixture = moe_layout.LAYER + "mlp"
    rotated = np.arange(latent.rope_dim)
    if in_pairs:
        rotated = in_halves(rotated, latent.rope_dim, latent.rope_dim)
    heads = np.arange(config.num_heads * config.head_dim).reshape(-1, config.head_dim)
    rest = config.head_dim - latent.rope_dim
    queries = np.concatenate([heads[:, rest:][:, rotated], heads[:, :rest]], axis=1).ravel()
    compressed = f"{theirs}.kv_a_proj_with_mqa"
    return llama_layout.weights_with(
        *linear(f"{ours}.q_proj", f"{theirs}.q_proj", queries),
        *linear(f"{ours}.q_a_proj", f"{theirs}.q_a_proj"),
        *norm(f"{ours}.q_a_norm", f"{theirs}.q_a_layernorm"),
        *linear(f"{ours}.q_b_proj", f"{theirs}.q_b_proj", queries),
        *linear(f"{ours}.kv_a_proj", compressed, np.arange(latent.rank)),
        *linear(f"{ours}.k_rope_proj", compressed, latent.rank + rotated),
        *norm(f"{ours}.kv_a_norm", f"{theirs}.kv_a_layernorm"),
        *linear(f"{ours}.kv_b_proj", f"{theirs}.kv_b_proj"),
        moe_layout.router(mixture),
        *moe_layout.experts(mixture, config.num_experts),
        *moe_layout.shared_expert(f"{mixture}.shared_experts"),
        *rows,
    )
