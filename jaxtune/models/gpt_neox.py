"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): parallel attention and MLP, fused heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import Block, ParallelBlock
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import by_key_head, fused, linear, norm, qkv
from jaxtune.nn.params import Policy

TINY = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def _sized(width: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    shape = dict(zip(llama_layout.SHAPE, (width, 4 * width, layers, heads), strict=True))
    return TINY | shape | {"vocab_size": vocab, "max_position_embeddings": 2048}


# Pythia, and GPT-NeoX-20B.
SIZES = {
    "160m": _sized(768, 12, 12),
    "410m": _sized(1024, 24, 16),
    "1b": _sized(2048, 16, 8),
    "1.4b": _sized(2048, 24, 16),
    "2.8b": _sized(2560, 32, 32),
    "6.9b": _sized(4096, 32, 32, 50432),
    "12b": _sized(5120, 36, 40, 50688),
    "20b": _sized(6144, 44, 64, 50432),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a GPT-NeoX config.json.

    Attributes:
        parallel: attention and MLP have the same input.
    """

    parallel: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        biased = hf.get("attention_bias", True)
        hf = {"rope_theta": hf.get("rotary_emb_base", 10000), "hidden_act": "gelu", **hf}
        return cls(
            parallel=hf.get("use_parallel_residual", True),
            **llama_layout.fields(
                hf,
                rotary=llama_layout.partial_rotary(hf, hf.get("rotary_pct", 0.25)),
                norm="layer",
                norm_eps=hf.get("layer_norm_eps", 1e-5),
                gated=False,
                qkv_bias=biased,
                out_bias=biased,
                mlp_bias=True,
            ),
        )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model."""
    return Decoder(config, policy, rngs, block=ParallelBlock if config.parallel else Block)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Each head's query, key and value follow each other in one tensor."""
    layer = "gpt_neox.layers.{}."
    heads = by_key_head(config.num_heads, config.num_heads, config.head_dim)
    return (
        Weight("embed.table", "gpt_neox.embed_in.weight", SAME),
        *norm("layers.attn_norm", layer + "input_layernorm"),
        *fused(qkv(heads), layer + "attention.query_key_value"),
        *linear("layers.attn.o_proj", layer + "attention.dense"),
        *norm("layers.mlp_norm", layer + "post_attention_layernorm"),
        *linear("layers.mlp.up_proj", layer + "mlp.dense_h_to_4h"),
        *linear("layers.mlp.down_proj", layer + "mlp.dense_4h_to_h"),
        *norm("norm", "gpt_neox.final_layer_norm"),
        *linear("lm_head", "embed_out"),
    )
