"""BLOOM (arXiv 2211.05100): ALiBi, a norm after the embedding, fused heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import by_key_head, fused, linear, norm, qkv
from jaxtune.nn.alibi import alibi_slopes
from jaxtune.nn.norm import LayerNorm
from jaxtune.nn.params import Policy

PREFIX = "transformer."

_NAMES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
TINY = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 259,
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def _sized(width: int, layers: int, heads: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "n_layer": layers, "n_head": heads}
    return TINY | shape | {"vocab_size": 250880}


SIZES = {
    "560m": _sized(1024, 24, 16),
    "1b1": _sized(1536, 24, 16),
    "1b7": _sized(2048, 24, 16),
    "3b": _sized(2560, 30, 32),
    "7b1": _sized(4096, 30, 32),
    "176b": _sized(14336, 70, 112),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a BLOOM config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; BLOOM was trained on rows of 2048 tokens, of which it says nothing."""
        if hf.get("apply_residual_connection_post_layernorm"):
            raise WeightError(
                "config.json: apply_residual_connection_post_layernorm is not supported for bloom"
            )
        hf = {"tie_word_embeddings": True, **llama_layout.renamed(hf, _NAMES)}
        hf.setdefault("hidden_size", hf.get("n_embed"))
        hf["intermediate_size"] = 4 * hf["hidden_size"]
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=llama_layout.layer_kinds(hf, None),
                alibi=alibi_slopes(hf["num_attention_heads"]),
                max_positions=hf.get("seq_length") or 2048,
                norm="layer",
                norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                activation="gelu_pytorch_tanh",
                gated=False,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
            )
        )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model, with a norm after the embedding."""
    model = Decoder(config, policy, rngs)
    model.embed_norm = LayerNorm(config.hidden_size, config.norm_eps, policy=policy)
    return model


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Each head's query, key and value follow each other in one tensor."""
    layer = "transformer.h.{}."
    heads = by_key_head(config.num_heads, config.num_heads, config.head_dim)
    return (
        Weight("embed.table", "transformer.word_embeddings.weight", SAME),
        *norm("embed_norm", "transformer.word_embeddings_layernorm"),
        *norm("layers.attn_norm", layer + "input_layernorm"),
        *fused(qkv(heads), layer + "self_attention.query_key_value"),
        *linear("layers.attn.o_proj", layer + "self_attention.dense"),
        *norm("layers.mlp_norm", layer + "post_attention_layernorm"),
        *linear("layers.mlp.up_proj", layer + "mlp.dense_h_to_4h"),
        *linear("layers.mlp.down_proj", layer + "mlp.dense_4h_to_h"),
        *norm("norm", "transformer.ln_f"),
        *linear("lm_head", "lm_head"),
    )
