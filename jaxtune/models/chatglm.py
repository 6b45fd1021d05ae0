"""ChatGLM 2 and 3, and GLM-4-9B as first published (arXiv 2406.12793): half of each head rotated
in pairs, fused projections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import concatenated, fused, gate_up, in_halves, linear, norm, qkv
from jaxtune.nn.rope import Rope

build = Decoder

_NAMES = {
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
}
TINY = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": 259,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 512,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
_6B = {"padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28}
_6B |= {"num_attention_heads": 32, "kv_channels": 128, "seq_length": 8192}
_9B = {"padded_vocab_size": 151552, "num_layers": 40, "rope_ratio": 500, "seq_length": 131072}
# ChatGLM3-6B (8192 tokens; ChatGLM2-6B has 32768) and glm-4-9b-chat.
SIZES = {"6b": TINY | _6B, "2-6b": TINY | _6B | {"seq_length": 32768}}
SIZES["4-9b"] = TINY | _6B | _9B | {"layernorm_epsilon": 1.5625e-07}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a ChatGLM config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; ChatGLM 1, and options that no published model uses, are refused."""
        usual = {"rmsnorm": True, "multi_query_attention": True, "add_bias_linear": False}
        usual |= {"apply_residual_connection_post_layernorm": False}
        for name, value in usual.items():
            if hf.get(name, not value) != value:
                raise WeightError(f"config.json: chatglm is supported with {name}={value} only")
        hf = llama_layout.renamed(hf, _NAMES)
        hf["num_key_value_heads"] = hf["multi_query_group_num"]
        theta = 10000.0 * hf.get("rope_ratio", 1)
        rope = Rope(head_dim=hf["head_dim"] // 2, theta=theta)
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=llama_layout.layer_kinds(hf, rope),
                qkv_bias=hf.get("add_qkv_bias", False),
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Two fused tensors, of which queries and keys have pairs of rotated numbers."""
    model, size = "transformer.encoder.", config.head_dim
    layer = model + "layers.{}."
    queries, keys = config.num_heads * size, config.num_kv_heads * size
    q, k, v = concatenated(queries, keys, keys)
    heads = (in_halves(q, size, size // 2), in_halves(k, size, size // 2), v)
    return (
        Weight("embed.table", "transformer.embedding.word_embeddings.weight", SAME),
        *norm("layers.attn_norm", layer + "input_layernorm"),
        *fused(qkv(heads), layer + "self_attention.query_key_value"),
        *linear("layers.attn.o_proj", layer + "self_attention.dense"),
        *norm("layers.mlp_norm", layer + "post_attention_layernorm"),
        *fused(gate_up(config.intermediate_size), layer + "mlp.dense_h_to_4h"),
        *linear("layers.mlp.down_proj", layer + "mlp.dense_4h_to_h"),
        *norm("norm", model + "final_layernorm"),
        *linear("lm_head", "transformer.output_layer"),
    )
