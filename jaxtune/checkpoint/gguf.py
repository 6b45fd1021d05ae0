"""Opens a GGUF file as if it were a Hugging Face model.

The file's metadata become a config.json, its tensor names Hugging Face's, and quantized tensors are
dequantized to float32 by the `gguf` package. llama.cpp stores q_proj and k_proj with the rows of
each head interleaved for its kind of RoPE; `_unpermute` restores Hugging Face's half-split order.
The `llama3` RoPE scaling is stored only as a tensor of factors, from which `_llama3_scaling`
recovers the parameters.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (metadata keys);
llama.cpp convert_hf_to_gguf.py (permutation, rope_freqs).
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, read_array
from jaxtune.errors import WeightError
from jaxtune.gguf_header import Entry, damaged, read_header

_FLOAT32 = np.dtype(np.float32)

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path, name: str) -> Checkpoint:
    """Opens a GGUF file of the llama architecture.

    Raises:
        WeightError: bad magic, truncated, another architecture, an unreadable quantization type.
    """
    metadata, entries = read_header(path)
    size = path.stat().st_size
    for stored, entry in entries.items():
        if entry.offset + _stored_bytes(path, stored, entry.kind, entry.shape) > size:
            raise damaged(path, f"truncated, {size} bytes do not reach tensor {stored}")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise WeightError(
            f"{path} holds a model of architecture {architecture!r}; jaxtune reads GGUF files of "
            "'llama' - use the model's safetensors version"
        )
    config = _llama_config(path, metadata, entries)
    renamed = {_hf_name(stored): stored for stored in entries if stored != "rope_freqs.weight"}
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }

    def read(hf_name: str) -> np.ndarray:
        array = _dequantize(path, renamed[hf_name], entries[renamed[hf_name]])
        module = hf_name.split(".")[-2]
        return _unpermute(array, heads[module]) if module in heads else array

    tensors = {hf: TensorInfo(entries[stored].shape, _FLOAT32) for hf, stored in renamed.items()}
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in special if config[key] is not None}
    return Checkpoint(name, path, config, generation, tensors, read)


def _stored_bytes(path: Path, stored: str, kind: int, shape: tuple[int, ...]) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as error:
        raise WeightError(
            f"{path}: tensor {stored} has quantization type {kind}, unknown to the installed gguf "
            "package - `pip install -U gguf`, or use another quantization"
        ) from error
    if not shape or shape[-1] % block:
        raise damaged(path, f"tensor {stored} of shape {shape} does not fit blocks of {block}")
    return math.prod(shape) // block * size


def _dequantize(path: Path, stored: str, entry: Entry) -> np.ndarray:
    """The tensor as float32."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(entry.kind)
    block, size = GGML_QUANT_SIZES[kind]
    if kind == GGMLQuantizationType.F64:
        info = TensorInfo(entry.shape, np.dtype(np.float64))
        return read_array(path, entry.offset, info).astype(np.float32)
    *rows, columns = entry.shape
    info = TensorInfo((*rows, columns // block * size), np.dtype(np.uint8))
    try:
        return dequantize(read_array(path, entry.offset, info), kind)
    except NotImplementedError as error:
        raise WeightError(
            f"{path}: tensor {stored} is quantized as {kind.name}, which the gguf package cannot "
            "dequantize - use another quantization of this model"
        ) from error


# ---- the llama architecture


def _hf_name(stored: str) -> str:
    """llama.cpp's tensor name -> Hugging Face's; unknown names stay, for the load to report."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(stored, stored)


def _unpermute(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's interleaved pairs to Hugging Face's two halves."""
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 9.999999747e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _llama_config(
    path: Path, metadata: dict[str, Any], entries: dict[str, Entry]
) -> dict[str, Any]:
    """A LlamaForCausalLM config.json, readable by transformers 4 and 5."""
    if metadata.get("llama.expert_count"):
        raise WeightError(f"{path} is a mixture-of-experts model - use a dense one")
    get = partial(_require, path, metadata)
    heads = get("llama.attention.head_count")
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise WeightError(f"{path} has a different number of heads in each layer - unsupported")
    width = get("llama.embedding_length")
    vocab_size = entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else 0
    theta = _shortest(metadata.get("llama.rope.freq_base", 10000.0))
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    scaling = _rope_scaling(path, metadata, entries, theta, head_dim)
    token = "tokenizer.ggml.{}_token_id".format
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "bos_token_id": metadata.get(token("bos")),
        "dtype": "float32",
        "eos_token_id": metadata.get(token("eos")),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": get("llama.feed_forward_length"),
        "max_position_embeddings": get("llama.context_length"),
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": get("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "pad_token_id": metadata.get(token("padding")),
        "rms_norm_eps": _shortest(get("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in entries,
        "vocab_size": vocab_size,
    }


def _require(path: Path, metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise damaged(path, f"its metadata lack {key}")
    return metadata[key]


def _rope_scaling(
    path: Path,
    metadata: dict[str, Any],
    entries: dict[str, Entry],
    theta: float,
    head_dim: int,
) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, or None for plain RoPE."""
    if "rope_freqs.weight" in entries:
        factors = _dequantize(path, "rope_freqs.weight", entries["rope_freqs.weight"])
        return _llama3_scaling(path, factors.astype(np.float64), theta, head_dim)
    key = "llama.rope.scaling.{}".format
    kind = metadata.get(key("type"), "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise WeightError(f"{path}: RoPE scaling {kind!r} is not supported - use another model")
    factor = _shortest(_require(path, metadata, key("factor")))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = _require(path, metadata, key("original_context_length"))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers Llama 3's scaling from the factor by which each frequency is divided.

    Between the two wavelength bounds 1/factor is linear in 1/wavelength with known ends (1/f and
    1); a line through those points gives both bounds. Only their ratio is determined, so
    low_freq_factor is set to 1, its value in every published model.
    """
    inverse_wavelength = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    factor = float(factors.max())
    between = (factors > 1.0) & (factors < factor)
    if factors.shape == inverse_wavelength.shape and between.sum() >= 2:
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(inverse_wavelength[between], smooth[between], 1)
        high = round(float(1 - 1 / offset), 3)
        original = round(slope * (high - 1))
        refit = np.clip((original * inverse_wavelength - 1) / (high - 1), 0, 1)
        if np.allclose(factors, 1 / ((1 - refit) / factor + refit), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": _shortest(factor),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise WeightError(f"{path}: its rope_freqs are not of Llama 3's form - use safetensors")
