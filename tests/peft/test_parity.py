"""Every method of the table that PEFT has, against PEFT: both ways, and merged."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxtune import peft, tree
from jaxtune.checkpoint.adapter import Adapter, first_values, load_adapter, save_adapter
from jaxtune.checkpoint.adapter_config import CONFIG_FILE
from jaxtune.checkpoint.fused import require_supported
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.models import falcon, gemma, gpt2, phi3, qwen2
from jaxtune.nn.params import AdapterParam
from jaxtune.schema import Peft
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore")

# Grouped queries, biases, and heads that are not width / number of heads.
SIZES = {"attention_bias": True, "head_dim": 12, "mlp_bias": True}
SOME = ["q_proj", "v_proj", "down_proj"]
DEEP = {"layers.0.self_attn.q_proj": 5, "down_proj": 2}

# Our name of a method -> PEFT's class and options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": DEEP,
            "use_rslora": True,
            "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
            "bias": "lora_only",
        },
    ),
    "dora": (
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_dora": True,
            "alpha_pattern": DEEP,
            "layers_to_transform": [1],
            "bias": "lora_only",
        },
    ),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "rank_pattern": DEEP}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 9}),
    "vera": ("VeraConfig", {"r": 6, "projection_prng_key": 3}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "r": 0, "num_cayley_neumann_terms": 6}),
}
TOKENS = [5, 90, 3]
TIED = {"tie_word_embeddings": True}
# On the embedding and the head: our method, PEFT's class and options, the base.
ON_EMBEDDING = {"r": 3, "target_modules": [*SOME, "embed_tokens"]}
OUTSIDE: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("dora", "LoraConfig", ON_EMBEDDING | {"use_dora": True, "lora_alpha": 5}, TIED),
    (
        "lora",
        "LoraConfig",
        {
            "r": 3,
            "lora_bias": True,
            "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]},
        },
        {},
    ),
    (
        "tokens",
        "TrainableTokensConfig",
        {"target_modules": ["embed_tokens"], "token_indices": TOKENS},
        TIED,
    ),
    ("dora", "LoraConfig", {"r": 3, "use_dora": True, "trainable_token_indices": TOKENS}, TIED),
    ("lora", "LoraConfig", ON_EMBEDDING | {"rank_pattern": {"embed_tokens": 2}}, {}),
    ("lora", "LoraConfig", ON_EMBEDDING, TIED),
    ("dora", "LoraConfig", ON_EMBEDDING | {"use_dora": True, "use_rslora": True}, {}),
    # The embeddings are scaled, and tied.
    ("dora", "LoraConfig", ON_EMBEDDING | {"use_dora": True}, gemma.TINY),
]
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("lora", "LoraConfig", {"r": 3, "layers_to_transform": [1]}),
    ("lora", "LoraConfig", {"r": 3, "bias": "all", "modules_to_save": ["model.norm"]}),
    ("ia3", "IA3Config", {"feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    ("lokr", "LoKrConfig", {"r": 64, "alpha": 5}),
    ("vera", "VeraConfig", {"r": 6, "target_modules": "all-linear", "save_projection": False}),
    ("ia3", "IA3Config", {"feedforward_modules": [], "target_modules": ["k_proj", "up_proj"]}),
    ("oft", "OFTConfig", {"oft_block_size": 16, "r": 0, "use_cayley_neumann": False}),
    ("dora", "LoraConfig", {"r": 3, "use_dora": True, "layers_to_transform": [1]}),
]
# Folders whose base PEFT makes again: it has lost what the adapter began as.
QKV = {"target_modules": ["qkv_proj", "gate_up_proj"]}
STARTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dora", QKV | {"init_lora_weights": "pissa", "use_dora": True}, phi3.TINY),
    ("lora", {"init_lora_weights": "pissa", "rank_pattern": DEEP}, {}),
    ("lora", {"init_lora_weights": "olora", "use_rslora": True}, {}),
    ("lora", {"init_lora_weights": "pissa", "target_modules": [*SOME, "embed_tokens"]}, {}),
    ("lora", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}, gpt2.TINY),
    ("lora", {"init_lora_weights": "mica"}, {}),  # this one leaves the base whole
]


def their_model(hf: Any, name: str, options: dict[str, Any]) -> Any:
    """A copy of the torch model with PEFT's adapter, every part of it random."""
    import peft as theirs
    import torch

    config = getattr(theirs, name)(**{"target_modules": SOME, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(1)
    model = theirs.get_peft_model(copy.deepcopy(hf), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def filled(
    loaded: oracle.Loaded, adapters: peft.Adapters, stored: dict[str, np.ndarray]
) -> tuple[tree.Skeleton, dict[str, Any]]:
    """The model with adapters, and values of their variables and of what else is stored."""
    abstract = loaded.skeleton.abstract()

    def build() -> nnx.Module:
        model = loaded.skeleton.model(abstract)
        peft.attach(model, adapters)
        return model

    skeleton = tree.describe(build)
    shapes = skeleton.abstract()
    rest = {name: shapes[name] for name in (set(shapes) - set(abstract)) | set(stored)}
    where = (loaded.stacks, loaded.params)
    return skeleton, first_values(rest, adapters, *where, stored=stored, seed=0)


def our_logits(loaded: oracle.Loaded, adapter: Any, tokens: np.ndarray) -> np.ndarray:
    skeleton, values = filled(loaded, adapter.adapters, adapter.params)
    return oracle.model_logits(skeleton.model(loaded.params | values), tokens)


def base_of(sizes: dict[str, Any]) -> Any:
    """The torch model of a config.json, or a Llama."""
    return oracle.hf_model(sizes) if "model_type" in sizes else oracle.hf_llama(**SIZES | sizes)


def check(
    hf: Any, method: str, name: str, options: dict[str, Any], layers: str, tmp_path: Path
) -> None:
    import peft as theirs
    import transformers

    model = their_model(hf, name, options)
    model.save_pretrained(tmp_path / "theirs")
    tokens = oracle.random_tokens(0, 2, 9)
    expected = oracle.hf_logits(model, tokens)
    assert oracle.difference(expected, oracle.hf_logits(hf, tokens)) > 0.1

    checkpoint = oracle.checkpoint_of(hf)
    loaded = oracle.load(checkpoint, layers=layers)
    shapes = loaded.skeleton.abstract()
    place = (shapes, loaded.weights, loaded.stacks)
    adapter = load_adapter(tmp_path / "theirs", *place, base=checkpoint)
    assert adapter.adapters.method == method
    assert oracle.difference(our_logits(loaded, adapter, tokens), expected) <= 1e-5

    save_adapter(tmp_path / "ours", adapter.params, adapter.adapters, *place, base="random")
    back = theirs.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours").eval()
    assert oracle.difference(oracle.hf_logits(back, tokens), expected) <= 1e-5
    written = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert set(written) == set(json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text()))

    arguments = (adapter.params, checkpoint, *place[1:])
    save_model(tmp_path / "merged", *arguments, adapters=adapter.adapters)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert oracle.difference(oracle.hf_logits(opened, tokens), expected) <= 1e-5
    if "embed" in adapter.adapters.choice and hf.config.tie_word_embeddings:
        return  # what PEFT merges has other logits than its adapter
    merged = model.merge_and_unload().state_dict()
    ours = open_checkpoint(str(tmp_path / "merged"))
    assert set(ours.tensors) == set(checkpoint.tensors)
    for key in ours.tensors:
        assert oracle.difference(ours.read(key), merged[key].numpy()) <= 1e-5, key


@pytest.mark.parametrize("method", CASES)
def test_peft_computes_the_same(method: str, tmp_path: Path):
    check(base_of({}), method, *CASES[method], "scan", tmp_path)


@pytest.mark.parametrize(
    ("method", "name", "options", "sizes"),
    [*OUTSIDE[:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in OUTSIDE[3:])],
)
def test_peft_computes_the_same_outside_of_the_layers(
    method: str, name: str, options: dict, sizes: dict, tmp_path: Path
):
    check(base_of(sizes), method, name, options, "scan", tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "sizes"),
    [STARTS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in STARTS[1:])],
)
def test_peft_makes_the_same_base_again(method: str, options: dict, sizes: dict, tmp_path: Path):
    hf = told_apart(base_of(sizes))
    check(hf, method, "LoraConfig", {"r": 3, "lora_alpha": 5} | options, "scan", tmp_path)


def told_apart(model: Any) -> Any:
    """The torch model with singular values that fall, so that rounding does not mix the largest."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                u, s, vt = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((u * (s[0] * 0.8 ** torch.arange(len(s)))) @ vt)
    return model


# Layers that are one in transformers and several here.
FUSED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("dora", "LoraConfig", QKV | {"r": 3, "use_dora": True}, phi3.TINY),
    ("loha", "LoHaConfig", QKV | {"r": 3, "alpha": 5}, phi3.TINY),
    ("ia3", "IA3Config", QKV | {"feedforward_modules": []}, phi3.TINY),
    ("ia3", "IA3Config", {"target_modules": ["c_attn"], "feedforward_modules": []}, gpt2.TINY),
    ("dora", "LoraConfig", {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}, gpt2.TINY),
    ("dora", "LoraConfig", {"use_dora": True, "target_modules": ["query_key_value"]}, falcon.TINY),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name", "options", "sizes"), FUSED)
def test_peft_computes_the_same_in_layers_that_it_has_as_one(
    method: str, name: str, options: dict, sizes: dict, tmp_path: Path
):
    check(base_of(sizes), method, name, options, "scan", tmp_path)


# Methods of which PEFT has the first two.
PARTS: dict[str, dict[str, Any]] = {
    "loha": {"rank": 2, "alpha": 3.0, "alpha_pattern": ("v_proj=5",)},
    "ia3": {"feedforward_modules": ("down_proj",)},
    "moslora": {"rank": 2, "alpha_pattern": ("v_proj=5",)},
    "lokr": {"rank": 2},
    "mora": {"rank": 2},
    "vera": {"rank": 4},
    "adalora": {"rank": 3, "target_rank": 2},
    "oft": {"block_size": 8},
}


@pytest.mark.parametrize(
    "method",
    [m if m == "lokr" else pytest.param(m, marks=pytest.mark.slow) for m in PARTS],
)
def test_some_parts_of_a_layer_are_adapted(method: str, tmp_path: Path):
    import peft as theirs
    import transformers

    hf, tokens = oracle.hf_model(phi3.TINY), oracle.random_tokens(0, 2, 9)
    checkpoint = oracle.checkpoint_of(hf)
    loaded = oracle.load(checkpoint, layers="scan")
    shapes = loaded.skeleton.abstract()
    section = Peft(
        **{"method": method, "target_modules": ("q_proj", "v_proj", "down_proj"), **PARTS[method]}
    )
    adapters = peft.choose_adapters(loaded.skeleton.model(shapes), section)
    place = (shapes, loaded.weights, loaded.stacks)
    require_supported(adapters, *place)
    skeleton, values = filled(loaded, adapters, {})
    random = np.random.default_rng(0)
    for name in sorted(skeleton.select(AdapterParam)):
        values[name] += random.normal(0, 0.15, values[name].shape)
    expected = our_logits(loaded, Adapter(adapters, values, ()), tokens)
    assert oracle.difference(expected, oracle.hf_logits(hf, tokens)) > 1e-3

    save_adapter(tmp_path / "ours", values, adapters, *place, base="random")
    back = load_adapter(tmp_path / "ours", *place, base=checkpoint)
    assert oracle.difference(our_logits(loaded, back, tokens), expected) <= 1e-5
    if method in ("loha", "ia3"):
        model = theirs.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours").eval()
        assert oracle.difference(oracle.hf_logits(model, tokens), expected) <= 1e-5
    else:
        with pytest.raises((KeyError, ValueError)):
            theirs.PeftModel.from_pretrained(hf, tmp_path / "ours")

    arguments = (values, checkpoint, *place[1:])
    save_model(tmp_path / "merged", *arguments, adapters=adapters)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert oracle.difference(oracle.hf_logits(merged, tokens), expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "dora", "target_modules": ("q_proj",)},
            "attn.q_proj is part of .*qkv_proj .* no part can be without adapter - target all",
        ),
        (
            {"method": "ia3", "feedforward_modules": ("up_proj",)},
            "gate_proj is part of .*gate_up_proj .* one input - take them out of peft.feedforward",
        ),
    ],
)
def test_parts_that_the_layer_cannot_have_are_refused(options: dict, message: str):
    loaded = oracle.load(open_checkpoint("tiny:phi3"), layers="scan")
    shapes = loaded.skeleton.abstract()
    adapters = peft.choose_adapters(loaded.skeleton.model(shapes), Peft(**options))
    with pytest.raises(ConfigError, match=message):
        require_supported(adapters, shapes, loaded.weights, loaded.stacks)


# Heads that are not width / number of heads, with a head that is tied; and biases in some layers.
FAMILIES = {"gemma": gemma.TINY, "qwen2": qwen2.TINY}


@pytest.mark.parametrize("family", ["gemma", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method", [m if m == "loha" else pytest.param(m, marks=pytest.mark.slow) for m in CASES]
)
def test_peft_computes_the_same_in_other_families(method: str, family: str, tmp_path: Path):
    name, options = CASES[method]
    own = {"modules_to_save": ["input_layernorm"]} if "modules_to_save" in options else {}
    check(base_of(FAMILIES[family]), method, name, options | own, "scan", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize(("method", "name", "options"), MORE)
def test_peft_computes_the_same_with_other_options(
    method: str, name: str, options: dict, layers: str, tmp_path: Path
):
    check(base_of({}), method, name, options, layers, tmp_path)
