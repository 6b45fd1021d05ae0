"""Parameter groups: LoRA+ as PEFT makes them, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.nn.params import Policy
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.optim.groups import is_kernel, rate_factors
from jaxtune.schema import Objective, Optim
from tests.oracle import hf_llama

RATES = {"learning_rate": 1e-3, "loraplus_ratio": 16.0, "embedding_learning_rate": 1e-5}
# Ours, by the last part of PEFT's names; PEFT's magnitudes of DoRA are vectors.
AXES = {
    "embed.adapter.a": ("vocab", None),
    "embed.adapter.b": (None, "embed"),
    "embed.adapter.magnitude": ("embed",),
    "layers.0.attn.q_proj.adapter.a": ("embed", None),
    "layers.0.attn.q_proj.adapter.b": (None, "heads"),
    "layers.0.attn.q_proj.adapter.magnitude": ("heads",),
    "layers.0.attn_norm.scale": ("embed",),
}


def ours(name: str) -> str:
    """PEFT's name of a parameter -> ours."""
    if "embed_tokens" in name:
        kinds = {"lora_embedding_A": "a", "lora_embedding_B": "b", "magnitude": "magnitude"}
        return "embed.adapter." + next(ours for kind, ours in kinds.items() if kind in name)
    if "layernorm" in name:
        return "layers.0.attn_norm.scale"
    kind = next(k for k in ("lora_A", "lora_B", "magnitude") if k in name)
    return "layers.0.attn.q_proj.adapter." + kind.removeprefix("lora_").lower()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rates_are_those_of_peft():
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model = hf_llama(num_hidden_layers=1)
    options = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "input_layernorm" in name)
    names = {id(p): ours(n) for n, p in adapted.named_parameters() if p.requires_grad}
    theirs = create_loraplus_optimizer(
        adapted,  # pyright: ignore[reportArgumentType]
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=1e-5,
    )
    expected = {
        names[id(parameter)]: group["lr"]
        for group in theirs.param_groups
        for parameter in group["params"]
    }
    assert set(AXES) <= set(expected.keys())
    factors = rate_factors(Optim(**RATES), AXES)
    for name in AXES:
        assert 1e-3 * factors.get(name, 1.0) == pytest.approx(expected[name]), name


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_steps_are_as_many_times_as_long(name: str):
    """The schedule and the decay of weights, which only matrices have, take part in it."""
    random = np.random.default_rng(0)
    params, grads = (
        {n: jnp.float32(random.normal(size=(4, 3)[: len(a)])) for n, a in AXES.items()}
        for _ in range(2)
    )
    steps = []
    for rates in (RATES, {"learning_rate": 1e-3}):
        for decay in (0.5, 0.0):
            numbers = Optim(name=name, weight_decay=decay, schedule="linear", **rates)
            tx = make_optimizer(numbers, make_schedule(numbers, 4), AXES)
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(grads, state, params)
            steps.append(jax.tree.map(np.asarray, updates))
    plus, plus_undecayed, plain, undecayed = steps
    factors = rate_factors(Optim(**RATES), AXES)
    assert sorted(set(factors.values())) == [pytest.approx(0.01), 16.0]
    for key in AXES:
        assert plus[key] == pytest.approx(factors.get(key, 1.0) * plain[key], rel=1e-5), key
        decays = not np.array_equal(plus[key], plus_undecayed[key])
        assert decays == (not np.array_equal(plain[key], undecayed[key])) == (len(AXES[key]) > 1)


def test_state_has_the_same_layout_without_groups():
    """Checkpoints of runs without LoRA+ name the leaves as before."""
    params = {name: np.zeros((4, 3)[: len(axes)], np.float32) for name, axes in AXES.items()}
    trees = []
    for rates in (RATES, {"learning_rate": 1e-3}):
        numbers = Optim(**rates)
        state = make_optimizer(numbers, optax.constant_schedule(0.1), AXES).init(params)
        trees.append([p for p, _ in jax.tree_util.tree_leaves_with_path(state)])
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    ("config", "outside"),
    [
        ("bert", {"classifier.out.kernel", "embed.table"}),
        ("qwen2_moe", {"layers.mlp.router.weight", "layers.mlp.shared_expert_gate.kernel"}),
    ],
)
def test_scores_are_no_matrices_of_layers(config: str, outside: set[str]):
    checkpoint = open_checkpoint(f"tiny:{config}")
    if config == "bert":
        objective = Objective(name="sequence_classification", labels=("a", "b", "c"))
        checkpoint = with_head(checkpoint, objective, seed=0)
    family, model_config = models.read_config(checkpoint.config, checkpoint.name)
    made = tree.describe(lambda: family.build(model_config, Policy(), nnx.Rngs(0)))
    axes = {name.replace("layers.0.", "layers."): made.axes(name) for name in made.abstract()}
    assert outside <= axes.keys()
    assert not any(is_kernel(axes[name]) for name in outside)
    assert is_kernel(axes["layers.attn.q_proj.kernel"])


def test_a_rate_of_an_embedding_that_does_not_train_is_refused():
    layers = {name: axes for name, axes in AXES.items() if name.startswith("layers.")}
    with pytest.raises(ConfigError, match="embedding_learning_rate=1e-05 would be ignored"):
        rate_factors(Optim(**RATES), layers)
