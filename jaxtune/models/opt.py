"""OPT (arXiv 2205.01068): learned positions, of which the first two rows are padding; ReLU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import linear, norm

build = Decoder
PREFIX = "model."

_FIRST_POSITION = 2
TINY = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 259,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def _sized(width: int, layers: int, heads: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return TINY | shape | {"vocab_size": 50272, "max_position_embeddings": 2048}


SIZES = {
    "125m": _sized(768, 12, 12),
    "1.3b": _sized(2048, 24, 32),
    "2.7b": _sized(2560, 32, 32),
    "6.7b": _sized(4096, 32, 32),
    "13b": _sized(5120, 40, 40),
    "30b": _sized(7168, 48, 56),
    "66b": _sized(9216, 64, 72),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from an OPT config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; OPT-350m, which is built otherwise, is refused."""
        narrow = hf.get("word_embed_proj_dim", hf["hidden_size"]) != hf["hidden_size"]
        if narrow or not hf.get("do_layer_norm_before", True):
            raise WeightError(
                "config.json: word_embed_proj_dim and do_layer_norm_before=false (OPT-350m) are "
                "not supported for opt"
            )
        hf = {"tie_word_embeddings": True, **hf, "intermediate_size": hf["ffn_dim"]}
        biased = hf.get("enable_bias", True)
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=llama_layout.layer_kinds(hf, None),
                position_rows=hf["max_position_embeddings"] + _FIRST_POSITION,
                norm="layer",
                norm_eps=1e-5,
                activation=llama_layout.activation(hf, "activation_function", "relu"),
                gated=False,
                qkv_bias=biased,
                out_bias=biased,
                mlp_bias=biased,
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Names of OPT."""
    del config
    model, layer = "model.decoder.", "model.decoder.layers.{}."
    return (
        Weight("embed.table", model + "embed_tokens.weight", SAME),
        Weight("positions.table", model + "embed_positions.weight", SAME),
        *norm("layers.attn_norm", layer + "self_attn_layer_norm"),
        *linear("layers.attn.q_proj", layer + "self_attn.q_proj"),
        *linear("layers.attn.k_proj", layer + "self_attn.k_proj"),
        *linear("layers.attn.v_proj", layer + "self_attn.v_proj"),
        *linear("layers.attn.o_proj", layer + "self_attn.out_proj"),
        *norm("layers.mlp_norm", layer + "final_layer_norm"),
        *linear("layers.mlp.up_proj", layer + "fc1"),
        *linear("layers.mlp.down_proj", layer + "fc2"),
        *norm("norm", model + "final_layer_norm"),
        *linear("lm_head", "lm_head"),
    )
