"""Tensor names and config fields of Llama, which most families have taken over.

A family takes the rows and fields, and says in its own file what is different.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models.base import SAME, Weight
from jaxtune.models.block import LayerKind
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.tables import linear, norm
from jaxtune.nn.mlp import ACTIVATIONS
from jaxtune.nn.rope import TYPES, Rope

_LAYER = "model.layers.{}."

_WEIGHTS = (
    Weight("embed.table", "model.embed_tokens.weight", SAME),
    *norm("layers.attn_norm", _LAYER + "input_layernorm"),
    *linear("layers.attn.q_proj", _LAYER + "self_attn.q_proj"),
    *linear("layers.attn.k_proj", _LAYER + "self_attn.k_proj"),
    *linear("layers.attn.v_proj", _LAYER + "self_attn.v_proj"),
    *linear("layers.attn.o_proj", _LAYER + "self_attn.o_proj"),
    *norm("layers.attn.q_norm", _LAYER + "self_attn.q_norm"),
    *norm("layers.attn.k_norm", _LAYER + "self_attn.k_norm"),
    *norm("layers.mlp_norm", _LAYER + "post_attention_layernorm"),
    *linear("layers.mlp.gate_proj", _LAYER + "mlp.gate_proj"),
    *linear("layers.mlp.up_proj", _LAYER + "mlp.up_proj"),
    *linear("layers.mlp.down_proj", _LAYER + "mlp.down_proj"),
    *norm("norm", "model.norm"),
    *linear("lm_head", "lm_head"),
)


TINY = {
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

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The weight table of a family that names its tensors as Llama does."""
    del config
    return _WEIGHTS


def weights_with(*rows: Weight) -> tuple[Weight, ...]:
    """Llama's table with some rows in place of those of the same parameters or tensors."""
    ours, theirs = {row.ours for row in rows}, {row.hf for row in rows}
    kept = (row for row in _WEIGHTS if row.ours not in ours and row.hf not in theirs)
    return (*kept, *rows)


def sized(tiny: Mapping[str, Any], shape: Sequence[int], **fields: Any) -> dict[str, Any]:
    """config.json of a published size: (width, MLP width, layers, heads, key heads) and the rest.

    Args:
        tiny: config.json of the family's tiny model.
        shape: see above.
        fields: everything else in which they differ.
    """
    names = (*SHAPE, "num_key_value_heads")
    return {**tiny, **dict(zip(names, shape, strict=True)), **fields}


def fields(
    hf: Mapping[str, Any],
    *,
    window: int | None = None,
    types: Sequence[str] | None = None,
    rotary: float | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The fields of a `DecoderConfig` from a config.json with Llama's names.

    Args:
        hf: config.json, of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`).
        window, types: see `layer_kinds`.
        rotary: share of a head that is rotated; None: all of it.
        changes: fields that the family reads otherwise.

    Raises:
        WeightError: of what is not supported, the first.
        KeyError: a field is missing.
    """
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    found = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "activation": activation(hf, "hidden_act"),
        "max_positions": hf.get("max_position_embeddings", 2048),
    }
    if "layer_kinds" not in changes:
        if rotary is None and partial_rotary(hf) != 1:
            model = hf.get("model_type")
            raise WeightError(f"config.json: partial_rotary_factor is not supported for {model}")
        rope = rope_from_hf(hf, int(head_dim * (rotary or 1)))
        found["layer_kinds"] = layer_kinds(hf, rope, window=window, types=types)
    return found | changes


def renamed(hf: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """config.json with Llama's names (keys of `names`) for fields that it calls otherwise."""
    return {**hf, **{ours: hf[theirs] for ours, theirs in names.items() if theirs in hf}}


def activation(hf: Mapping[str, Any], field: str, default: str = "silu") -> str:
    """The activation that a field of config.json names; WeightError for an unknown one."""
    name = hf.get(field) or default
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise WeightError(f"config.json: {field} {name!r} is unknown - known: {known}")
    return name


def layer_kinds(
    hf: Mapping[str, Any],
    rope: Rope | None,
    *,
    window: int | None = None,
    types: Sequence[str] | None = None,
    local_rope: Rope | None = None,
) -> tuple[LayerKind, ...]:
    """The kind of each layer, by `layer_types` of config.json.

    Args:
        hf: config.json.
        rope: of layers that see everything, and of the others unless `local_rope` is given.
        window: of layers with a window.
        types: `layer_types` where config.json has none; None: all layers see everything.
        local_rope: of layers with a window.

    Raises:
        WeightError: a layer is of another type.
    """
    full = ["full_attention"] * hf["num_hidden_layers"]
    kinds = {
        "full_attention": LayerKind(rope),
        "sliding_attention": LayerKind(local_rope or rope, window),
    }
    named = hf.get("layer_types") or types or full
    unknown = sorted(set(named) - set(kinds))
    if unknown:
        raise WeightError(f"config.json: layer type {unknown[0]!r} is not supported")
    return tuple(kinds[name] for name in named)


def late_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`window` and `types` of Qwen: with `use_sliding_window`, of the layers after the first."""
    if not hf.get("use_sliding_window"):
        return {"window": None}
    first, count = hf.get("max_window_layers", 28), hf["num_hidden_layers"]
    types = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    return {"window": hf.get("sliding_window", 4096), "types": types}


def partial_rotary(hf: Mapping[str, Any], default: float = 1.0) -> float:
    """Which share of a head config.json wants rotated."""
    options = hf.get("rope_parameters") or hf
    return options.get("partial_rotary_factor") or default


def rope_from_hf(
    hf: Mapping[str, Any], head_dim: int, options: Mapping[str, Any] | None = None
) -> Rope:
    """The rotation that config.json asks for.

    Args:
        hf: config.json.
        head_dim: numbers of a head that are rotated.
        options: in place of `rope_scaling` and `rope_parameters`.

    Raises:
        WeightError: the type is unknown.
    """
    if options is None:
        options = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind not in TYPES:
        known = ", ".join(TYPES)
        raise WeightError(f"config.json: rope type {kind!r} is not supported - supported: {known}")
    names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    names += ("attention_factor", "mscale", "mscale_all_dim", "truncate")
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name in ("short_factor", "long_factor"):
        given[name] = tuple(options.get(name) or ())
    max_positions = hf.get("max_position_embeddings", 2048)
    field = "original_max_position_embeddings"
    original = options.get(field) or hf.get(field)
    if kind == "longrope" and "factor" not in given:
        given["factor"] = max_positions / (original or max_positions)
    return Rope(
        head_dim=head_dim,
        theta=options.get("rope_theta") or hf.get("rope_theta") or 10000.0,
        type=kind,
        max_positions=max_positions,
        original_max_positions=original or max_positions,
        **given,
    )
