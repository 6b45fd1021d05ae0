"""Tensor names and config fields of BERT, which its kin have taken over under another prefix."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import LayerKind
from jaxtune.models.llama_layout import activation
from jaxtune.models.tables import linear, norm

TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def sized(tiny: Mapping[str, Any], width: int, layers: int, heads: int, **fields: Any) -> dict:
    """config.json of a published size, whose MLP is four times as wide as its layers."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return {**tiny, **shape, "vocab_size": 30522, **fields}


def fields(hf: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The fields of an `EncoderConfig` from a config.json with BERT's names.

    Args:
        hf: config.json.
        changes: fields that the family reads otherwise.

    Raises:
        WeightError: of what is not supported, the first.
        KeyError: a field is missing.
    """
    if hf.get("position_embedding_type", "absolute") != "absolute" or hf.get("is_decoder"):
        raise WeightError(
            "config.json: only position_embedding_type=absolute and is_decoder=false are supported "
            f"for {hf['model_type']}"
        )
    heads, width, rows = (
        hf[name] for name in ("num_attention_heads", "hidden_size", "max_position_embeddings")
    )
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": width,
        "embedding_size": width,
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "layer_kinds": (LayerKind(),) * hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "max_positions": rows,
        "position_rows": rows,
        "type_rows": hf.get("type_vocab_size", 2),
        "activation": activation(hf, "hidden_act", "gelu"),
        "norm": "layer",
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "causal": False,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        **changes,
    }


def weights(prefix: str) -> tuple[Weight, ...]:
    """The rows of an encoder whose tensors begin with a prefix."""
    embeddings, layer = prefix + "embeddings.", prefix + "encoder.layer.{}."
    return (
        Weight("embed.table", embeddings + "word_embeddings.weight", SAME),
        Weight("positions.table", embeddings + "position_embeddings.weight", SAME),
        Weight("types.table", embeddings + "token_type_embeddings.weight", SAME),
        *norm("embed_norm", embeddings + "LayerNorm"),
        *linear("embed_proj", prefix + "embeddings_project"),
        *linear("layers.attn.q_proj", layer + "attention.self.query"),
        *linear("layers.attn.k_proj", layer + "attention.self.key"),
        *linear("layers.attn.v_proj", layer + "attention.self.value"),
        *linear("layers.attn.o_proj", layer + "attention.output.dense"),
        *norm("layers.attn_norm", layer + "attention.output.LayerNorm"),
        *linear("layers.mlp.up_proj", layer + "intermediate.dense"),
        *linear("layers.mlp.down_proj", layer + "output.dense"),
        *norm("layers.mlp_norm", layer + "output.LayerNorm"),
    )
