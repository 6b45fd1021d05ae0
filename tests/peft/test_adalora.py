"""AdaLoRA's budget, penalty and folders against PEFT."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import build
from jaxtune.checkpoint.adapter import load_adapter
from jaxtune.checkpoint.adapter_config import CONFIG_FILE
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.safetensors import read_folder, read_tensor
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.exports import write_adapter
from jaxtune.optim.allocation import Allocation, allocate, cubic
from jaxtune.peft import adalora
from jaxtune.schema import Data, Objective, Optim, Peft, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.train import train
from tests import oracle, tolerances
from tests.peft.test_parity import our_logits, their_model
from tests.test_train import run_config

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"attn.q_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.down_proj"}
SUFFIX = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}
NUMBERS = {"tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.7, "total_step": 12}


def their_adalora(hf: Any, **options: Any) -> Any:
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 5, "total_step": 9} | options
    return their_model(hf, "AdaLoraConfig", {"target_modules": ["q_proj", "down_proj"]} | options)


def ours_of(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's parameters of two layers as our stacks."""
    found = {}
    for ours, theirs in TARGETS.items():
        for leaf, suffix in SUFFIX.items():
            name = f"base_model.model.model.layers.{{}}.{theirs}.{suffix}.default"
            layers = [parameters[name.format(i)] for i in range(2)]
            layers = [x[:, 0] if leaf == "e" else x.T for x in layers]
            found[f"layers.0.{ours}.adapter.{leaf}"] = np.stack(layers)
    return found


def test_the_budget_goes_where_pefts_allocator_puts_it():
    import torch

    model = their_adalora(oracle.hf_llama(), **NUMBERS)
    theirs = {n: p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
    params: Any = ours_of({n: p.detach().numpy().copy() for n, p in theirs.items()})
    names = [name for name in params if name.endswith(".e")]
    budget, decides = cubic(16, 8, begin=2, end=9, every=2)
    plan = Allocation({n: np.ones((2, 4), bool) for n in names}, budget, decides, 0.8, 0.7)
    tx = allocate(optax.sgd(0.1), plan)
    state, update = tx.init(params), jax.jit(tx.update)
    random, kept = np.random.default_rng(0), []
    for step in range(1, 13):
        grads = {n: random.normal(size=p.shape).astype(np.float32) for n, p in theirs.items()}
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.grad = torch.tensor(grads[name])
                parameter -= 0.1 * parameter.grad
        model.base_model.update_and_allocate(step)
        updates, state = update(ours_of(grads), state, params)
        params = optax.apply_updates(params, updates)
        wanted = ours_of({n: p.detach().numpy() for n, p in theirs.items()})
        for name, array in wanted.items():
            assert oracle.difference(params[name], array) <= 1e-5, (step, name)
            np.testing.assert_array_equal(np.asarray(params[name]) == 0, array == 0)
        kept.append(sum(int((params[name] != 0).sum()) for name in names))
    # Between decisions all may grow; PEFT decides after steps 4, 6, 8 and 9, and keeps that.
    assert kept == [16, 16, 16, int(budget[4]), 16, int(budget[6]), 16, int(budget[8]), 8, 8, 8, 8]


def test_the_penalty_is_pefts():
    import torch

    model = their_adalora(oracle.hf_llama())
    pairs = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    tokens = torch.tensor(oracle.random_tokens(0, 2, 9)).long()
    plain = model.base_model.model(input_ids=tokens, labels=tokens).loss
    (model(input_ids=tokens, labels=tokens).loss - plain).backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    values: Any = ours_of({n: p.detach().numpy() for n, p in model.named_parameters()})
    run = described(rank=4, target_rank=2)
    fixed = {n: jnp.zeros(leaf.shape, leaf.dtype) for n, leaf in run.frozen.items()}
    fixed |= {n: jnp.ones(leaf.shape) for n, leaf in run.frozen.items() if n.endswith(".scale")}

    def penalty(values: Any) -> jax.Array:
        assert run.adapters is not None
        return adalora.penalty(run.skeleton.model(fixed | values), run.adapters.config)

    found, slopes = jax.value_and_grad(penalty)(values)
    rows = [p.detach().numpy() for p in pairs]
    rows = [p if len(p) == 4 else p.T for p in rows]
    norms = [np.linalg.norm(p @ p.T - np.eye(4)) for p in rows]
    assert abs(float(found) - 0.5 * np.mean(norms)) <= 1e-5 * float(found)
    wanted = ours_of(gradients)
    for name, slope in slopes.items():
        if not name.endswith(".e"):
            assert oracle.difference(slope, wanted[name]) <= tolerances.GRADIENTS, name


def described(**peft: Any) -> build.Run:
    options = {"method": "adalora", "alpha": 5.0, "target_modules": ("q_proj", "down_proj")} | peft
    config = RunConfig(peft=Peft(**options), data=Data(train=("rows.jsonl",)))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return build.describe(config, mesh, oracle.checkpoint_of(oracle.hf_llama()))


def test_a_folder_has_the_triplets_that_are_left(tmp_path: Path):
    import peft

    run, random = described(rank=4, target_rank=2), np.random.default_rng(1)
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    for name, leaf in run.trainable.items():
        values[name] = random.normal(size=leaf.shape).astype(np.float32)
    left = {"attn.q_proj": [(1, 0, 1, 0), (1, 1, 1, 1)], "mlp.down_proj": [(0, 0, 0, 1), (0,) * 4]}
    for path, flags in left.items():
        values[f"layers.0.{path}.adapter.e"] *= np.array(flags)
    write_adapter(run, values, tmp_path / "adapter")
    pattern = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["rank_pattern"]
    # Where nothing is left, one triplet of no effect stands for the layer.
    assert pattern["model.layers.0.mlp.down_proj.lora_E"] == [False, False, False, True]
    assert sorted(map(sum, pattern.values())) == [1, 1, 2, 4]
    hf = oracle.hf_llama()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "adapter")
    merged = loaded.merge_and_unload().state_dict()
    for ours, theirs in TARGETS.items():
        for index in range(2):
            slot = f"layers.0.{ours}.adapter"
            a, e, b, s = (
                np.asarray(values[f"{slot}.{k}"][index]) for k in ("a", "e", "b", "scale")
            )
            name = f"model.layers.{index}.{theirs}.weight"
            wanted = hf.state_dict()[name].numpy() + (s * (a * e) @ b).T
            assert oracle.difference(merged[name].numpy(), wanted) <= 1e-5
    shapes = run.skeleton.abstract()
    base = {name: shapes[name] for name in shapes if ".adapter." not in name}
    place = (run.family.weights(run.model_config), run.stacks)
    back = load_adapter(tmp_path / "adapter", base, *place, base=run.checkpoint)
    assert [c.rank for c in back.adapters.choice["layers.0.mlp.down_proj"]] == [1, 1]
    assert [c.rank for c in back.adapters.choice["layers.0.attn.q_proj"]] == [2, 4]
    again = described(adapter=str(tmp_path / "adapter"), alpha=32.0, target_modules=("all-linear",))
    assert build.make_optimizer(again, optax.constant_schedule(0.1), 1) is not None  # no budget


def test_layers_outside_the_stack_lose_triplets(tmp_path: Path):
    peft = Peft(method="adalora", rank=4, target_rank=1, target_modules=("pooler", "q_proj"))
    objective = Objective(name="sequence_classification", labels=("a", "b"))
    config = RunConfig(objective=objective, peft=peft, data=Data(train=("rows.jsonl",)))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    headed = with_head(open_checkpoint("tiny:bert"), objective, seed=0)  # its pooler is no new one
    run = build.describe(config, mesh, headed)
    tx = build.make_optimizer(run, optax.constant_schedule(0.1), 2)
    random = np.random.default_rng(0)
    params: Any = {n: random.normal(size=x.shape, scale=0.1) for n, x in run.trainable.items()}
    grads = {name: random.normal(size=array.shape) for name, array in params.items()}
    params, grads = jax.tree.map(jnp.float32, (params, grads))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):  # nothing is important before the first
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    layers = run.model_config.num_layers + 1
    es = [params[name] for name in params if name.endswith(".e")]
    assert sum(int((e != 0).sum()) for e in es) == layers
    # All of the pooler's but its third.
    params["classifier.pooler.adapter.e"] = jnp.array([0.0, 0.0, 2.0, 0.0])
    write_adapter(run, params, tmp_path)
    pattern = json.loads((tmp_path / CONFIG_FILE).read_text())["rank_pattern"]
    assert pattern["bert.pooler.dense.lora_E"] == [False, False, True, False]
    written = {name: read_tensor(at) for name, at in read_folder(tmp_path).items()}
    (a,) = (array for name, array in written.items() if name.endswith("pooler.dense.lora_A"))
    np.testing.assert_array_equal(a[0], params["classifier.pooler.adapter.a"][:, 2])


def test_pefts_rank_pattern_is_read(tmp_path: Path):
    hf = oracle.hf_llama()
    model = their_adalora(hf, total_step=3, init_r=3, target_r=1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() ** 2 if parameter.requires_grad else None
    for step in (1, 2, 3):
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    tokens = oracle.random_tokens(0, 2, 9)
    checkpoint = oracle.checkpoint_of(hf)
    loaded = oracle.load(checkpoint)
    place = (loaded.skeleton.abstract(), loaded.weights, loaded.stacks)
    adapter = load_adapter(tmp_path, *place, base=checkpoint)
    ranks = [c.rank for configs in adapter.adapters.choice.values() for c in configs]
    assert sum(ranks) == 4 and len(ranks) == 4
    expected = oracle.hf_logits(model.eval(), tokens)
    assert oracle.difference(our_logits(loaded, adapter, tokens), expected) <= 1e-5


@pytest.mark.slow
def test_a_run_ends_with_its_budget_and_resumes(tmp_path: Path):
    peft = {
        "method": "adalora",
        "rank": 4,
        "target_rank": 1,
        "target_modules": ("q_proj", "o_proj"),
    }
    peft |= {"budget_final_steps": 1}

    def cfg(name: str) -> RunConfig:
        cfg = run_config(tmp_path, name, peft=peft, checkpoint={"every_steps": 2})
        return dataclasses.replace(cfg, optim=Optim(learning_rate=1e-2, schedule="constant"))

    whole = train(cfg("run")).paths["adapter"]
    numbers = [read_tensor(at) for name, at in read_folder(whole).items() if "lora_E" in name]
    assert sum(int((array != 0).sum()) for array in numbers) == len(numbers) == 6
    before = (whole / "adapter_model.safetensors").read_bytes()
    resumed = cfg("run")
    resumed = dataclasses.replace(
        resumed, checkpoint=dataclasses.replace(resumed.checkpoint, resume="2")
    )
    after = train(resumed).paths["adapter"] / "adapter_model.safetensors"
    assert after.read_bytes() == before


def test_a_run_too_short_for_its_budget_is_refused():
    run = described(rank=8, budget_start_steps=3, budget_final_steps=4)
    with pytest.raises(ConfigError, match="= 7 leave none of 7 steps"):
        build.make_optimizer(run, optax.constant_schedule(0.1), 7)
