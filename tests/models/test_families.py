"""Every family of the table against transformers, and what holds for each of them."""

import dataclasses
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import build, models, tree
from jaxtune.checkpoint import experts_in_peft
from jaxtune.checkpoint.adapter import load_adapter, save_adapter
from jaxtune.checkpoint.fused import require_supported
from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.safetensors import write_folder
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data.batch import TokenBatch
from jaxtune.errors import ConfigError
from jaxtune.infer import engine
from jaxtune.infer.sampling import make_sampling
from jaxtune.models import llama_layout
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.params import Policy
from jaxtune.objectives.sft import sft
from jaxtune.peft import choose_adapters, continued
from jaxtune.policy import resolve_policy
from jaxtune.schema import Data, Model, Peft, RunConfig
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import make_mesh
from tests import oracle, tolerances

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
ALIBI = {"max_position_embeddings": None, "model_max_length": 512}

# Other config.json fields than TINY's, by family: the variants that are tried besides TINY.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "mistral": {
        "no-window": {"sliding_window": None, "tie_word_embeddings": True},
        "head-dim": {"head_dim": 12, "hidden_act": "gelu", "num_key_value_heads": 1},
    },
    "qwen2": {
        "tied": {"tie_word_embeddings": True},
        "late-windows": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "num_hidden_layers": 4,
        },
    },
    "gemma": {"biases": {"attention_bias": True, "tie_word_embeddings": False}},
    "gemma2": {"plain": {"attn_logit_softcapping": None, "final_logit_softcapping": None}},
    "gemma3_text": {
        "published-pattern": {"layer_types": None, "num_hidden_layers": 8},
        "cap": {"final_logit_softcapping": 30.0},
    },
    "glm": {"multi-head": {"num_key_value_heads": 4, "attention_bias": False}},
    "glm4": {"whole-heads": {"partial_rotary_factor": 1.0}},
    "olmo2": {"multi-head": {"num_key_value_heads": 4, "attention_bias": True}},
    "phi3": {
        "longrope": {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
            # Shorter than every prompt: at the switch transformers computes its cache anew.
            "original_max_position_embeddings": 3,
            "max_position_embeddings": 64,
        },
        "partial": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "window": {"sliding_window": 6},
    },
    "stablelm": {"parallel": {"use_parallel_residual": True, "use_qkv_bias": True}},
    "baichuan": {
        "1-7b": {"z_loss_weight": None},
        "1-13b": {"z_loss_weight": None} | ALIBI,
        "2-13b": ALIBI,
    },
    "chatglm": {"4-9b": {"rope_ratio": 50, "add_qkv_bias": False, "kv_channels": 12}},
    "internlm": {"unbiased": {"bias": False}},
    "internlm2": {"biased": {"bias": True, "num_key_value_heads": 1}},
    "internlm3": {"biased": {"bias": True}},
    "qwen": {"biased": {"no_bias": False, "rotary_emb_base": 1e5}},
    "bloom": {"odd-heads": {"n_head": 6, "hidden_size": 48}},
    "falcon": {
        "new": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "new-one-norm": {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        "rw": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    },
    "gpt2": {"untied": {"tie_word_embeddings": False, "n_inner": 40}},
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False, "rotary_pct": 1.0},
        "unbiased": {"attention_bias": False, "hidden_act": "gelu_fast"},
    },
    "gptj": {"wide": {"rotary_dim": 16, "n_inner": 48}},
    "opt": {"unbiased": {"enable_bias": False, "activation_function": "gelu"}},
    "qwen3": {"biases": {"attention_bias": True, "tie_word_embeddings": True}},
    "mixtral": {"window": {"sliding_window": 6, "tie_word_embeddings": True}},
    "deepseek_v2": {
        "lite": {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True},
        "yarn": {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.8,
                "original_max_position_embeddings": 16,
            },
            "first_k_dense_replace": 0,
        },
    },
    "deepseek_v3": {
        "halves": {"rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 2}
    },
    "gpt_oss": {"published-pattern": {"layer_types": None, "num_hidden_layers": 4}},
    "qwen2_moe": {
        "windows": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
            "num_hidden_layers": 4,
            "norm_topk_prob": True,
            "qkv_bias": False,
        }
    },
    "qwen3_moe": {"biases": {"attention_bias": True, "norm_topk_prob": False}},
}
PAIRS = ("mt5", "t5")  # in test_t5.py; encoders are in test_heads.py
CASES = [(name, variant) for name in VARIANTS for variant in ("tiny", *VARIANTS[name])]


def config_of(name: str, variant: str) -> dict[str, Any]:
    """A config.json that transformers reads as it stands; fields that are None are left out."""
    fields = models.family(name).TINY | VARIANTS[name].get(variant, {})
    return {key: value for key, value in fields.items() if value is not None}


def cases(*quick: str, but: tuple[str, ...] = ()) -> Any:
    """All families and variants; those whose id is not among `quick` (or "tiny") are slow."""
    marked = []
    for name, variant in CASES:
        is_quick = variant in quick and name not in but or f"{name}-{variant}" in quick
        marks = [] if is_quick else [pytest.mark.slow]
        marked.append(pytest.param(name, variant, marks=marks, id=f"{name}-{variant}"))
    return pytest.mark.parametrize(("name", "variant"), marked)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model_of(name: str, variant: str) -> tuple[Any, Checkpoint, np.ndarray]:
    """The torch model, the same as a checkpoint, and tokens to try it with."""
    hf = oracle.hf_model(config_of(name, variant))
    return hf, oracle.checkpoint_of(hf), oracle.random_tokens(1, 2, 24)


@cases("tiny", but=("deepseek_v2", "qwen2_moe", "qwen3_moe"))  # like others but for little
def test_logits_and_round_trip(name: str, variant: str, tmp_path: Path):
    hf, checkpoint, tokens = model_of(name, variant)
    expected = oracle.hf_logits(hf, tokens)
    assert np.abs(expected).max() > 0.5
    loaded = oracle.load(checkpoint)
    assert oracle.difference(oracle.logits(loaded, tokens), expected) <= tolerances.LOGITS
    folder = tmp_path / "out"
    save_model(folder, loaded.params, checkpoint, loaded.weights, loaded.stacks)
    oracle.assert_same_files(folder, checkpoint)


@cases("gptj-tiny")
def test_gradients_are_those_of_torch(name: str, variant: str):
    hf, checkpoint, tokens = model_of(name, variant)
    loaded = oracle.load(checkpoint)
    padding = getattr(hf.config, "pad_token_id", None)
    if padding is not None:
        # torch gives the input row of padding no gradient.
        tokens = np.where(tokens == padding, 3, tokens)
    positions = np.broadcast_to(np.arange(24), tokens.shape)
    ones = np.ones_like(tokens)
    batch = TokenBatch(tokens, positions, ones, ones.astype(np.float32))

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = loaded.skeleton.model(params)
            total, sums = sft(model, batch, loss_dtype=jnp.float32)
            return total / sums["weight"]

        return jax.grad(loss)(params)

    got = gradient(loaded.params)
    theirs = oracle.hf_gradients(hf, tokens)

    def gradient_of(tensor: str) -> np.ndarray:
        # What torch keeps as a buffer has no gradient.
        return np.broadcast_to(theirs.get(tensor, 0.0), checkpoint.tensors[tensor].shape)

    read = dataclasses.replace(checkpoint, read=gradient_of)
    expected = load_weights(read, loaded.weights, loaded.skeleton.abstract(), loaded.stacks)
    scale = max(np.abs(x).max() for x in theirs.values())
    for path in expected:
        assert np.abs(got[path] - expected[path]).max() <= tolerances.GRADIENTS * scale, path


@cases("mistral-tiny", "bloom-tiny")
def test_cached_generation(name: str, variant: str):
    import torch

    hf, checkpoint, tokens = model_of(name, variant)
    loaded = oracle.load(checkpoint)
    prompts = [tokens[0, :9].tolist(), tokens[1, :4].tolist()]
    sampling = make_sampling(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    answers = engine.generate(
        loaded.skeleton, loaded.params, prompts, max_new_tokens=32, eos_ids=(), sampling=sampling
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        row = np.array([prompt + answer], np.int32)
        full = oracle.logits(loaded, row)[0].argmax(-1)
        assert full[len(prompt) - 1 : -1].tolist() == answer
        if hasattr(hf, "generate"):
            hf.generation_config.eos_token_id = None
            theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
            assert theirs[0, len(prompt) :].tolist() == answer
        else:
            theirs = oracle.hf_logits(hf, row)[0].argmax(-1)
            assert theirs[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.filterwarnings("ignore")  # PEFT warns of Conv1D, and of heads that are tied
@cases("gpt2-tiny", "qwen3_moe-tiny", "gpt_oss-tiny")
def test_lora_in_peft(name: str, variant: str, tmp_path: Path):
    hf, checkpoint, tokens = model_of(name, variant)
    loaded = oracle.load(checkpoint)
    options: dict[str, Any] = {"target_modules": TARGETS, "lora_bias": True}
    if models.family(name).Config.from_hf(checkpoint.config).num_experts:
        # PEFT takes what has the name of an expert's layer for one.
        beside = (".*shared_expert.*", r".*\.mlp\.\w+_proj")
        joined = () if name in (*experts_in_peft.JOINED, "gpt_oss") else (".*experts.*",)
        options = {"target_modules": ("all-linear",), "exclude_modules": beside + joined}
    adapted = oracle.adapt(loaded, Peft(rank=3, alpha=5.0, **options))
    place = (loaded.skeleton.abstract(), loaded.weights, loaded.stacks)
    require_supported(adapted.adapters, *place)
    assert experts_in_peft.problem(adapted.adapters, loaded.weights, name) is None
    params = {**adapted.frozen, **adapted.trainable}
    ours = oracle.model_logits(adapted.skeleton.model(params), tokens)
    folder = tmp_path / "adapter"
    save_adapter(folder, params, adapted.adapters, *place, base="random")
    for path, array in load_adapter(folder, *place, base=checkpoint).params.items():
        mine = params.get(path, np.zeros_like(array))
        np.testing.assert_allclose(array, mine, rtol=1e-6, err_msg=path)
    if hasattr(hf, "generate"):
        import peft

        theirs = oracle.hf_logits(peft.PeftModel.from_pretrained(hf, str(folder)).eval(), tokens)
        assert oracle.difference(theirs, ours) <= tolerances.LOGITS


@cases()
def test_laws(name: str, variant: str):
    _, checkpoint, tokens = model_of(name, variant)
    loaded = oracle.load(checkpoint)
    expected = oracle.logits(loaded, tokens)
    unrolled = oracle.logits(oracle.load(checkpoint, layers="unroll"), tokens)
    assert oracle.difference(unrolled, expected) <= tolerances.LOGITS
    positions = np.tile(np.concatenate([np.arange(10), np.arange(14)]), (2, 1))
    segments = np.tile(np.repeat([1, 2], [10, 14]).astype(np.int32), (2, 1))
    packed = oracle.logits(loaded, tokens, positions, segments)
    for part in (slice(0, 10), slice(10, 24)):
        alone = oracle.logits(loaded, tokens[:, part])
        assert oracle.difference(packed[:, part], alone) <= tolerances.LOGITS
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2})
    sharded = oracle.load(checkpoint, mesh=mesh)
    placed = rules.placed(sharded.skeleton, mesh)
    params = {path: jax.device_put(x, placed[path].sharding) for path, x in sharded.params.items()}
    spread = oracle.logits(sharded._replace(params=params), tokens, None, np.ones_like(tokens))
    assert oracle.difference(spread, expected) <= tolerances.SHARDED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models.FAMILIES if name not in PAIRS])
def test_sizes_have_the_parameters_that_they_are_named_after(name: str):
    family = models.family(name)
    for size in family.SIZES:
        config = family.Config.from_hf(models.sized(name, size))
        skeleton = tree.describe(lambda c=config: family.build(c, Policy(), nnx.Rngs(0)))
        match = re.fullmatch(r"(?:\d-)?(?:(\d)x)?([\d.]+)([mb])(\d*)(?:-.*)?", size)
        assert match is not None, size
        number = float(f"{match[2]}.{match[4]}" if match[4] else match[2]) * int(match[1] or 1)
        named = number * {"m": 1e6, "b": 1e9}[match[3]]
        # Names are generous: OLMo 2 1B has 1.48 billion, Gemma 2 2B has 2.6.
        assert tree.count(skeleton.abstract()) == pytest.approx(named, rel=0.5), size


@pytest.mark.parametrize("name", models.FAMILIES)
def test_tables_are_complete_and_sizes_are_read(name: str):
    family = models.family(name)
    for fields in (family.TINY, *family.SIZES.values()):
        config = family.Config.from_hf(fields)
        assert config.num_layers == len(config.layer_kinds)
        assert config.causal == (name in VARIANTS or name in PAIRS)
        rows = family.weights(config)
        for tensor in {row.hf for row in rows if row.columns is not None}:
            joined = np.concatenate([row.columns for row in rows if row.hf == tensor])
            np.testing.assert_array_equal(np.sort(joined), np.arange(len(joined)), tensor)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_files_without_the_prefix_of_the_model(name: str, tmp_path: Path):
    tiny = open_checkpoint(f"tiny:{name}")
    prefix = models.family(name).PREFIX
    short = {tensor.removeprefix(prefix): tensor for tensor in tiny.tensors}
    infos = {key: tiny.tensors[tensor] for key, tensor in short.items()}
    write_folder(tmp_path, infos, lambda key: tiny.read(short[key]))
    (tmp_path / "config.json").write_text(json.dumps(tiny.config))
    assert open_checkpoint(str(tmp_path)).tensors == tiny.tensors


def test_adapters_of_experts_that_peft_would_misread_are_named(capsys: Any):
    def adapted(name: str, **options: Any) -> tuple[Any, Any]:
        loaded = oracle.load(open_checkpoint(f"tiny:{name}"))
        model = loaded.skeleton.model(loaded.skeleton.abstract())
        return choose_adapters(model, Peft(**options)), loaded.weights

    def problem(name: str, **options: Any) -> str:
        return str(experts_in_peft.problem(*adapted(name, **options), name))

    assert problem("mixtral") == "None"
    assert "wants gate_proj and up_proj" in problem("mixtral", exclude_modules=("up_proj",))
    ranks = {"rank_pattern": ("gate_proj=2", "up_proj=2")}
    assert "gate_proj has another" in problem("mixtral", **ranks)
    assert "_proj for an expert" in problem("deepseek_v3")
    assert "cannot join those of qwen2_moe's" in problem("qwen2_moe")
    config = RunConfig(peft=Peft(rank=2), data=Data(train=("rows.jsonl",)))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    run = build.describe(config, mesh, open_checkpoint("tiny:qwen2_moe"))
    build.with_remat(run, "full")
    assert capsys.readouterr().err.count("PEFT cannot load this adapter: it cannot join") == 1
    assert problem("gpt_oss") == "None"
    for options in ({"method": "dora"}, {"dropout": 0.1}):
        with pytest.raises(ConfigError, match="cannot adapt experts, and layers.0.mlp.experts"):
            adapted("mixtral", **options)
    loaded = oracle.load(open_checkpoint("tiny:mixtral"))
    model = loaded.skeleton.model(loaded.skeleton.abstract())
    with pytest.raises(ConfigError, match="dropout=0.1 cannot adapt .* without dropout$"):
        continued(adapted("mixtral")[0], Peft(adapter="folder", dropout=0.1), model)


def test_rows_longer_than_learned_positions_are_refused():
    config = dataclasses.replace(RunConfig(), data=Data(max_seq_len=1024))
    model_config = models.read_config(models.family("gpt2").TINY, "tiny:gpt2")[1]
    with pytest.raises(ConfigError, match="max_seq_len=1024: the model has learned 512"):
        resolve_policy(config, model_config, make_mesh({"data": 1}, jax.devices()[:1]))


def test_windows_that_do_not_repeat_within_a_stage_are_refused():
    config = dataclasses.replace(RunConfig(), model=Model(path="tiny:gemma2"))
    model_config = models.read_config(models.family("gemma2").TINY, "tiny:gemma2")[1]
    with pytest.raises(ConfigError, match="inside the 2 after which they repeat"):
        resolve_policy(config, model_config, make_mesh({"stage": 3}, jax.devices()[:3]))


def test_the_family_of_the_contributing_page(monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = page.split("### Adding a model family")[1].split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 40
    module = types.ModuleType("jaxtune.models.page")
    names = {"dataclass": dataclasses.dataclass, "Any": Any, "Mapping": Mapping}
    names |= {"llama_layout": llama_layout, "Decoder": Decoder, "DecoderConfig": DecoderConfig}
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(models.FAMILIES, "mistral", "page")
    exec(example, module.__dict__)
    hf, checkpoint, tokens = model_of("mistral", "tiny")
    got = oracle.logits(oracle.load(checkpoint), tokens)
    assert oracle.difference(got, oracle.hf_logits(hf, tokens)) <= tolerances.LOGITS
