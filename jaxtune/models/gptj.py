"""GPT-J: attention and MLP after one norm, rotation in pairs, a head with a bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.models import llama_layout
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import ParallelBlock
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.tables import linear, norm, paired_heads
from jaxtune.nn.params import Policy

_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
TINY = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "vocab_size": 259,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "n_inner": None,
    "rotary_dim": 8,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
}
SIZES = {
    "6b": TINY
    | {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16}
    | {"n_positions": 2048, "rotary_dim": 64}
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a GPT-J config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json."""
        hf = llama_layout.renamed(hf, _NAMES)
        hf["intermediate_size"] = hf.get("n_inner") or 4 * hf["hidden_size"]
        rope = llama_layout.rope_from_hf(hf, hf.get("rotary_dim", 64))
        return cls(
            **llama_layout.fields(
                hf,
                layer_kinds=llama_layout.layer_kinds(hf, rope),
                norm="layer",
                norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                norms=("attn_norm",),
                activation=llama_layout.activation(hf, "activation_function", "gelu_new"),
                gated=False,
                mlp_bias=True,
                head_bias=True,
            )
        )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model."""
    return Decoder(config, policy, rngs, block=ParallelBlock)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Names of GPT-J."""
    layer = "transformer.h.{}."
    return (
        Weight("embed.table", "transformer.wte.weight", SAME),
        *norm("layers.attn_norm", layer + "ln_1"),
        *paired_heads(config, layer + "attn."),
        *linear("layers.attn.v_proj", layer + "attn.v_proj"),
        *linear("layers.attn.o_proj", layer + "attn.out_proj"),
        *linear("layers.mlp.up_proj", layer + "mlp.fc_in"),
        *linear("layers.mlp.down_proj", layer + "mlp.fc_out"),
        *norm("norm", "transformer.ln_f"),
        *linear("lm_head", "lm_head"),
    )
