"""GPT-2: learned positions, layer norms, plain MLPs; its matrices lie as ours do (Conv1D)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import concatenated, fused, linear, norm, qkv

build = Decoder
PREFIX = "transformer."

_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
TINY = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 259,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def _sized(width: int, layers: int, heads: int) -> dict[str, Any]:
    shape = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return TINY | shape | {"vocab_size": 50257, "n_positions": 1024}


SIZES = {
    "124m": _sized(768, 12, 12),
    "355m": _sized(1024, 24, 16),
    "774m": _sized(1280, 36, 20),
    "1.5b": _sized(1600, 48, 25),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a GPT-2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; attention that is scaled otherwise is refused."""
        if hf.get("scale_attn_by_inverse_layer_idx") or not hf.get("scale_attn_weights", True):
            raise WeightError("config.json: only scale_attn_weights is supported for gpt2")
        hf = {"tie_word_embeddings": True, **llama_layout.renamed(hf, _NAMES)}
        hf["intermediate_size"] = hf.get("n_inner") or 4 * hf["hidden_size"]
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=llama_layout.layer_kinds(hf, None),
                position_rows=hf["max_position_embeddings"],
                norm="layer",
                norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                activation=llama_layout.activation(hf, "activation_function", "gelu_new"),
                gated=False,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """One fused tensor; nothing is transposed but an untied head."""
    width, layer = config.hidden_size, "transformer.h.{}."
    return (
        Weight("embed.table", "transformer.wte.weight", SAME),
        Weight("positions.table", "transformer.wpe.weight", SAME),
        *norm("layers.attn_norm", layer + "ln_1"),
        *fused(qkv(concatenated(width, width, width)), layer + "attn.c_attn", SAME),
        *linear("layers.attn.o_proj", layer + "attn.c_proj", change=SAME),
        *norm("layers.mlp_norm", layer + "ln_2"),
        *linear("layers.mlp.up_proj", layer + "mlp.c_fc", change=SAME),
        *linear("layers.mlp.down_proj", layer + "mlp.c_proj", change=SAME),
        *norm("norm", "transformer.ln_f"),
        *linear("lm_head", "lm_head"),
    )
