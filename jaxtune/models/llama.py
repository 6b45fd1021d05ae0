"""Llama 1 to 3.x and the many models that are Llama under another name (SmolLM, TinyLlama, Yi
...).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.errors import WeightError
from jaxtune.models.base import SAME, TRANSPOSE, Weight
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.mlp import GATES
from jaxtune.nn.params import Policy
from jaxtune.nn.rope import TYPES, Rope

_HF = "model.layers.{}."

WEIGHTS = (
    Weight("embed.table", "model.embed_tokens.weight", SAME),
    Weight("layers.attn_norm.scale", _HF + "input_layernorm.weight", SAME),
    Weight("layers.attn.q_proj.kernel", _HF + "self_attn.q_proj.weight", TRANSPOSE),
    Weight("layers.attn.k_proj.kernel", _HF + "self_attn.k_proj.weight", TRANSPOSE),
    Weight("layers.attn.v_proj.kernel", _HF + "self_attn.v_proj.weight", TRANSPOSE),
    Weight("layers.attn.o_proj.kernel", _HF + "self_attn.o_proj.weight", TRANSPOSE),
    Weight("layers.attn.q_proj.bias", _HF + "self_attn.q_proj.bias", SAME),
    Weight("layers.attn.k_proj.bias", _HF + "self_attn.k_proj.bias", SAME),
    Weight("layers.attn.v_proj.bias", _HF + "self_attn.v_proj.bias", SAME),
    Weight("layers.attn.o_proj.bias", _HF + "self_attn.o_proj.bias", SAME),
    Weight("layers.mlp_norm.scale", _HF + "post_attention_layernorm.weight", SAME),
    Weight("layers.mlp.gate_proj.kernel", _HF + "mlp.gate_proj.weight", TRANSPOSE),
    Weight("layers.mlp.up_proj.kernel", _HF + "mlp.up_proj.weight", TRANSPOSE),
    Weight("layers.mlp.down_proj.kernel", _HF + "mlp.down_proj.weight", TRANSPOSE),
    Weight("layers.mlp.gate_proj.bias", _HF + "mlp.gate_proj.bias", SAME),
    Weight("layers.mlp.up_proj.bias", _HF + "mlp.up_proj.bias", SAME),
    Weight("layers.mlp.down_proj.bias", _HF + "mlp.down_proj.bias", SAME),
    Weight("norm.scale", "model.norm.weight", SAME),
    Weight("lm_head.kernel", "lm_head.weight", TRANSPOSE),
)

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama3(shape: tuple[int, int, int, int], *, factor: float, tied: bool) -> dict[str, Any]:
    """config.json of Llama 3.1 or 3.2 with (width, MLP width, layers, heads)."""
    width, mlp, layers, heads = shape
    return TINY | {
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
    }


# Published sizes, for plans without files: Llama 3.2 (1b, 3b) and 3.1, from their config.json. 104b
# has the matrices of Command R+ (c4ai-command-r-plus) in Llama's order.
SIZES = {
    "1b": _llama3((2048, 8192, 16, 32), factor=32.0, tied=True),
    "3b": _llama3((3072, 8192, 28, 24), factor=32.0, tied=True),
    "8b": _llama3((4096, 14336, 32, 32), factor=8.0, tied=False),
    "70b": _llama3((8192, 28672, 80, 64), factor=8.0, tied=False),
    "104b": _llama3((12288, 33792, 64, 96), factor=8.0, tied=True) | {"vocab_size": 256000},
    "405b": _llama3((16384, 53248, 126, 128), factor=8.0, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a Llama config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json, of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
        heads = hf["num_attention_heads"]
        head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
        max_positions = hf.get("max_position_embeddings", 2048)
        activation = hf.get("hidden_act", "silu")
        if activation not in GATES:
            known = ", ".join(GATES)
            raise WeightError(f"config.json: hidden_act {activation!r} is unknown - known: {known}")
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            activation=activation,
            max_positions=max_positions,
            rope=rope_from_hf(hf, head_dim, max_positions),
        )


def rope_from_hf(hf: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """The rotation that config.json asks for; WeightError for an unknown type."""
    options = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind not in TYPES:
        known = ", ".join(TYPES)
        raise WeightError(f"config.json: rope type {kind!r} is not supported - supported: {known}")
    if options.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightError("config.json: partial_rotary_factor is not supported for llama")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    fields += ("attention_factor", "mscale", "mscale_all_dim", "truncate")
    given = {name: options[name] for name in fields if options.get(name) is not None}
    return Rope(
        head_dim=head_dim,
        theta=options.get("rope_theta") or hf.get("rope_theta") or 10000.0,
        type=kind,
        max_positions=max_positions,
        original_max_positions=options.get("original_max_position_embeddings") or max_positions,
        **given,
    )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model, with random parameters (or none, under `tree.describe`)."""
    return Decoder(config, policy, rngs)
