"""Tensor names and config fields of T5, which mT5 has taken over."""

from collections.abc import Mapping
from typing import Any

from jaxtune import ops
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import LayerKind
from jaxtune.models.encoder_decoder import EncoderDecoderConfig
from jaxtune.models.llama_layout import activation
from jaxtune.models.tables import linear, norm

TINY = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Of version 1.1, on which Flan-T5 and mT5 build.
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_PUBLISHED = {
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "eos_token_id": 1,
}
_NAMES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def sized(*shape: int, **fields: Any) -> dict[str, Any]:
    """config.json of a published size: the numbers of `_NAMES`, and in what else it differs."""
    named = dict(zip(_NAMES, shape, strict=True))
    return TINY | _PUBLISHED | named | {"num_decoder_layers": named["num_layers"]} | fields


def gated_sizes(**fields: Any) -> dict[str, dict[str, Any]]:
    """The sizes of version 1.1, by name."""
    shapes = {
        "small": (512, 64, 1024, 8, 6),
        "base": (768, 64, 2048, 12, 12),
        "large": (1024, 64, 2816, 24, 16),
        "xl": (2048, 64, 5120, 24, 32),
        "xxl": (4096, 64, 10240, 24, 64),
    }
    return {name: sized(*shape, **GATED, **fields) for name, shape in shapes.items()}


def fields(hf: Mapping[str, Any], *, scaled: bool) -> dict[str, Any]:
    """The fields of an `EncoderDecoderConfig` from a config.json with T5's names.

    Args:
        hf: config.json.
        scaled: the head multiplies with hidden states that are divided by sqrt(D).

    Raises:
        WeightError: the activation is unknown.
        KeyError: a field is missing.
    """
    gate, _, name = hf.get("feed_forward_proj", "relu").rpartition("-")
    # As transformers reads it: T5's gelu is the approximate one.
    name = "gelu_new" if gate and name == "gelu" else name
    encoder = hf["num_layers"]
    decoder = hf.get("num_decoder_layers") or encoder
    start = hf.get("decoder_start_token_id")
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["d_model"],
        "intermediate_size": hf["d_ff"],
        "num_layers": encoder + decoder,
        "layer_kinds": (LayerKind(),) * encoder + (LayerKind(crosses=True),) * decoder,
        "num_heads": hf["num_heads"],
        "num_kv_heads": hf["num_heads"],
        "head_dim": hf["d_kv"],
        "norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "scale": 1.0,
        "gated": gate == "gated",
        "activation": activation({"feed_forward_proj": name}, "feed_forward_proj"),
        "buckets": hf.get("relative_attention_num_buckets", 32),
        "furthest": hf.get("relative_attention_max_distance", 128),
        "start_token": (hf.get("pad_token_id") or 0) if start is None else start,
        "max_positions": hf.get("n_positions", 512),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "logits": ops.Logits(scale=hf["d_model"] ** -0.5 if scaled else 1.0),
    }


def weights(config: EncoderDecoderConfig) -> tuple[Weight, ...]:
    """The weight table; the decoder's layers count from the encoder's last."""
    decoder = (
        *_attention("decoder", "attn", 0, "SelfAttention"),
        *_attention("decoder", "cross", 1, "EncDecAttention"),
        *_mlp("decoder", 2, config.gated),
    )
    return (
        Weight("embed.table", "shared.weight", SAME),
        *(_bias(stack) for stack in ("encoder", "decoder")),
        *_attention("encoder", "attn", 0, "SelfAttention"),
        *_mlp("encoder", 1, config.gated),
        *norm("encoder_norm", "encoder.final_layer_norm"),
        *(row._replace(first=config.encoder_layers) for row in decoder),
        *norm("norm", "decoder.final_layer_norm"),
        *linear("lm_head", "lm_head"),
    )


def _bias(stack: str) -> Weight:
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return Weight(f"{stack}_bias.table", name, SAME)


def _attention(stack: str, ours: str, part: int, theirs: str) -> tuple[Weight, ...]:
    """Rows of an attention, the part of a layer that Hugging Face numbers so, and of its norm."""
    hf = f"{stack}.block.{{}}.layer.{part}"
    rows = norm(f"layers.{stack}.{ours}_norm", f"{hf}.layer_norm")
    for name in "qkvo":
        rows += linear(f"layers.{stack}.{ours}.{name}_proj", f"{hf}.{theirs}.{name}")
    return rows


def _mlp(stack: str, part: int, gated: bool) -> tuple[Weight, ...]:
    hf = f"{stack}.block.{{}}.layer.{part}"
    names = {"down_proj": "wo"} | (
        {"gate_proj": "wi_0", "up_proj": "wi_1"} if gated else {"up_proj": "wi"}
    )
    rows = norm(f"layers.{stack}.mlp_norm", f"{hf}.layer_norm")
    for ours, theirs in names.items():
        rows += linear(f"layers.{stack}.mlp.{ours}", f"{hf}.DenseReluDense.{theirs}")
    return rows
