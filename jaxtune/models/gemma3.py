"""Gemma 3, text only (arXiv 2503.19786): five layers with a window and a rotation of their own to
one without, queries and keys normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune import ops
from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.base import Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import norm

build = Decoder

TINY = llama_layout.TINY | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 5,
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "layer_types": [
        *("sliding_attention", "full_attention", "sliding_attention", "full_attention"),
        "sliding_attention",
    ],
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_LARGE = {
    "vocab_size": 262144,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": None,
}
SIZES = {
    "270m": llama_layout.sized(TINY, (640, 2048, 18, 4, 1), **_LARGE),
    "1b": llama_layout.sized(TINY, (1152, 6912, 26, 4, 1), **_LARGE),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Gemma 3 text config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json, of transformers 4 or, with ropes by layer type, 5."""
        if hf.get("attn_logit_softcapping") or hf.get("use_bidirectional_attention"):
            raise WeightError(
                "config.json: attn_logit_softcapping and use_bidirectional_attention are not "
                "supported for gemma3_text"
            )
        hf = {"tie_word_embeddings": True, **hf}
        every = hf.get("sliding_window_pattern") or 6
        count, head_dim = hf["num_hidden_layers"], hf.get("head_dim", 256)
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
        ropes = hf.get("rope_parameters") or {}
        whole = {"rope_theta": hf.get("rope_theta") or 1e6} | dict(hf.get("rope_scaling") or {})
        local = {"rope_theta": hf.get("rope_local_base_freq") or 1e4}
        kinds = llama_layout.layer_kinds(
            hf,
            llama_layout.rope_from_hf(hf, head_dim, whole | ropes.get("full_attention", {})),
            window=hf.get("sliding_window", 4096),
            types=types,
            local_rope=llama_layout.rope_from_hf(
                hf, head_dim, local | ropes.get("sliding_attention", {})
            ),
        )
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=kinds,
                head_dim=head_dim,
                activation=llama_layout.activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
                norm="centered_rms",
                norms=("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
                qk_norm="head",
                embed_scale=hf["hidden_size"] ** 0.5,
                scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
                logits=ops.Logits(softcap=hf.get("final_logit_softcapping")),
                qkv_bias=hf.get("attention_bias", False),
                out_bias=hf.get("attention_bias", False),
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
