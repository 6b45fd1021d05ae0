"""Every family of the table against transformers, and what holds for each of them."""

from typing import Any

import numpy as np
import pytest

from jaxtune import models
from tests import oracle, tolerances

ALIBI = {"max_position_embeddings": None, "model_max_length": 512}

# Other config.json fields than TINY's, by family: the variants that are tried besides TINY.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "mistral": {
        "no-window": {"sliding_window": None, "tie_word_embeddings": True},
        "head-dim": {"head_dim": 12, "hidden_act": "gelu", "num_key_value_heads": 1},
    },
    "qwen2": {
        "tied": {"tie_word_embeddings": True},
        "late-windows": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "num_hidden_layers": 4,
        },
    },
    "gemma": {"biases": {"attention_bias": True, "tie_word_embeddings": False}},
    "gemma2": {"plain": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
    "gemma3_text": {
        "published-pattern": {"layer_types": None, "num_hidden_layers": 8},
        "cap": {"final_logit_softcapping": 30.0},
    },
    "glm": {"multi-head": {"num_key_value_heads": 4, "attention_bias": False}},
    "glm4": {"whole-heads": {"partial_rotary_factor": 1.0}},
    "olmo2": {"multi-head": {"num_key_value_heads": 4, "attention_bias": True}},
    "phi3": {
        "longrope": {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
        },
        "partial": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "window": {"sliding_window": 6},
    },
    "stablelm": {"parallel": {"use_parallel_residual": True, "use_qkv_bias": True}},
    "baichuan": {
        "1-7b": {"z_loss_weight": None},
        "1-13b": {"z_loss_weight": None} | ALIBI,
        "2-13b": ALIBI,
    },
    "chatglm": {"4-9b": {"rope_ratio": 50, "add_qkv_bias": False, "kv_channels": 12}},
    "internlm": {"unbiased": {"bias": False}},
    "internlm2": {"biased": {"bias": True, "num_key_value_heads": 1}},
    "internlm3": {"biased": {"bias": True}},
    "qwen": {"biased": {"no_bias": False, "rotary_emb_base": 1e5}},
    "bloom": {"odd-heads": {"n_head": 6, "hidden_size": 48}},
    "falcon": {
        "new": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "new-one-norm": {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        "rw": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    },
    "gpt2": {"untied": {"tie_word_embeddings": False, "n_inner": 40}},
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False, "rotary_pct": 1.0},
        "unbiased": {"attention_bias": False, "hidden_act": "gelu_fast"},
    },
    "gptj": {"wide": {"rotary_dim": 16, "n_inner": 48}},
    "opt": {"unbiased": {"enable_bias": False, "activation_function": "gelu"}},
    "qwen3": {"biases": {"attention_bias": True, "tie_word_embeddings": True}},
}
CASES = [(name, variant) for name in models.FAMILIES for variant in ("tiny", *VARIANTS[name])]


def config_of(name: str, variant: str) -> dict[str, Any]:
    """A config.json that transformers reads as it stands; fields that are None are left out."""
    fields = models.family(name).TINY | VARIANTS[name].get(variant, {})
    return {key: value for key, value in fields.items() if value is not None}


def cases(*, default: int) -> Any:
    """All families and variants; after the `default` first of each family they are slow."""
    marked = []
    for name, variant in CASES:
        index = list(("tiny", *VARIANTS[name])).index(variant)
        marks = [pytest.mark.slow] if index >= default else []
        marked.append(pytest.param(name, variant, marks=marks, id=f"{name}-{variant}"))
    return pytest.mark.parametrize(("name", "variant"), marked)


@cases(default=1)
def test_logits_are_those_of_transformers(name: str, variant: str):
    hf = oracle.hf_model(config_of(name, variant))
    tokens = oracle.random_tokens(1, 2, 24)
    expected = oracle.hf_logits(hf, tokens)
    assert np.abs(expected).max() > 0.5
    checkpoint = oracle.checkpoint_of(hf)
    got = oracle.logits(oracle.load(checkpoint), tokens)
    assert oracle.difference(got, expected) <= tolerances.LOGITS
