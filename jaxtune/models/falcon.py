"""Falcon (arXiv 2311.16867): one key head or a few, attention and MLP side by side or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import Block, ParallelBlock
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import by_key_head, fused, linear, norm, qkv
from jaxtune.nn.alibi import alibi_slopes
from jaxtune.nn.params import Policy

TINY = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "bias": False,
    "alibi": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_LARGE = {"vocab_size": 65024, "max_position_embeddings": 2048}
_NEW = _LARGE | {"new_decoder_architecture": True, "num_kv_heads": 8}
SIZES = {
    "7b": TINY
    | _LARGE
    | {"hidden_size": 4544, "num_hidden_layers": 32}
    | {"num_attention_heads": 71},
    "11b": TINY
    | _NEW
    | {"hidden_size": 4096, "num_hidden_layers": 60}
    | {"num_attention_heads": 32, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 8192},
    "40b": TINY
    | _NEW
    | {"hidden_size": 8192, "num_hidden_layers": 60}
    | {"num_attention_heads": 128},
    "180b": TINY
    | _NEW
    | {"hidden_size": 14848, "num_hidden_layers": 80}
    | {"num_attention_heads": 232},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Falcon config.json.

    Attributes:
        parallel: attention and MLP have the same input.
    """

    parallel: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; with ALiBi the slopes are divided by sqrt(head_dim), as the scores."""
        hf = {"tie_word_embeddings": True, **hf}
        heads, width, is_new = (
            hf["num_attention_heads"],
            hf["hidden_size"],
            hf.get("new_decoder_architecture", False),
        )
        parallel = is_new or hf.get("parallel_attn", True)
        two_norms = not parallel or (is_new and (hf.get("num_ln_in_parallel_attn") or 2) == 2)
        one_key = not is_new and hf.get("multi_query", True)
        hf["num_key_value_heads"] = 1 if one_key else hf.get("num_kv_heads") if is_new else heads
        hf["intermediate_size"] = hf.get("ffn_hidden_size") or 4 * width
        biased, slopes, changes = hf.get("bias", False), None, {}
        if hf.get("alibi"):
            slopes = tuple(slope * (width // heads) ** -0.5 for slope in alibi_slopes(heads))
            changes["layer_kinds"] = llama_layout.layer_kinds(hf, None)
        return cls(
            parallel=parallel,
            **llama_layout.fields(
                hf,
                alibi=slopes,
                norm="layer",
                norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                norms=("attn_norm", "mlp_norm") if two_norms else ("attn_norm",),
                activation=llama_layout.activation(hf, "activation", "gelu"),
                gated=False,
                qkv_bias=biased,
                out_bias=biased,
                mlp_bias=biased,
                **changes,
            ),
        )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model."""
    return Decoder(config, policy, rngs, block=ParallelBlock if config.parallel else Block)


def weights(config: Config) -> tuple[Weight, ...]:
    """Each key head follows its queries; names of norms depend on how many there are."""
    layer = "transformer.h.{}."
    first, second = "input_layernorm", "post_attention_layernorm"
    if config.parallel and "mlp_norm" in config.norms:
        first, second = "ln_attn", "ln_mlp"
    heads = by_key_head(config.num_heads, config.num_kv_heads, config.head_dim)
    return (
        Weight("embed.table", "transformer.word_embeddings.weight", SAME),
        *norm("layers.attn_norm", layer + first),
        *fused(qkv(heads), layer + "self_attention.query_key_value"),
        *linear("layers.attn.o_proj", layer + "self_attention.dense"),
        *norm("layers.mlp_norm", layer + second),
        *linear("layers.mlp.up_proj", layer + "mlp.dense_h_to_4h"),
        *linear("layers.mlp.down_proj", layer + "mlp.dense_4h_to_h"),
        *norm("norm", "transformer.ln_f"),
        *linear("lm_head", "lm_head"),
    )
