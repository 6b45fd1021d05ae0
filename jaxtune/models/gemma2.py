"""Gemma 2 (arXiv 2408.00118): Gemma with norms around, soft caps, and windows in turn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune import ops
from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import norm

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
_LARGE = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
SIZES = {
    "2b": llama_layout.sized(TINY, (2304, 9216, 26, 8, 4), **_LARGE),
    "9b": llama_layout.sized(TINY, (3584, 14336, 42, 16, 8), **_LARGE),
    "27b": llama_layout.sized(TINY, (4608, 36864, 46, 32, 16), **_LARGE)
    | {"head_dim": 128, "query_pre_attn_scalar": 144},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Gemma 2 config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; every other layer has a window, from the first on."""
        hf = {"tie_word_embeddings": True, **hf}
        count = hf["num_hidden_layers"]
        types = [("sliding_attention", "full_attention")[i % 2] for i in range(count)]
        biased = hf.get("attention_bias", False)
        return cls(
            **llama_layout.fields(
                hf,
                window=hf.get("sliding_window", 4096),
                types=types,
                activation=llama_layout.activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
                norm="centered_rms",
                norms=("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
                embed_scale=hf["hidden_size"] ** 0.5,
                scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
                softcap=hf.get("attn_logit_softcapping", 50.0),
                logits=ops.Logits(softcap=hf.get("final_logit_softcapping", 30.0)),
                qkv_bias=biased,
                out_bias=biased,
            )
        )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table with names for the norms after attention and around the MLP."""
    del config
    layer = "model.layers.{}."
    return llama_layout.weights_with(
        *norm("layers.attn_post_norm", layer + "post_attention_layernorm"),
        *norm("layers.mlp_norm", layer + "pre_feedforward_layernorm"),
        *norm("layers.mlp_post_norm", layer + "post_feedforward_layernorm"),
    )
