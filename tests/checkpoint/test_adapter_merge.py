import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune import merge
from jaxtune.checkpoint.adapter import Adapter
from jaxtune.checkpoint.adapter_file import WEIGHTS_FILE
from jaxtune.checkpoint.adapter_sum import summed
from jaxtune.checkpoint.safetensors import read_header, read_tensor
from jaxtune.errors import ConfigError, WeightError
from jaxtune.peft import Adapters, lora
from jaxtune.peft.combine import COMBINATIONS, Knobs, Pair
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A torch model with two random adapters of different scale, and their folders."""
    import peft
    import torch

    torch.manual_seed(0)
    make = {"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(oracle.hf_llama(), peft.LoraConfig(lora_alpha=6, **make), "a")
    model.add_adapter("b", peft.LoraConfig(lora_alpha=3, use_rslora=True, **make))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    return model, [folder / "a", folder / "b"]


def products(folder: Path) -> dict[str, np.ndarray]:
    """The change of each layer's weight that a folder stands for."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    stored = read_header(folder / WEIGHTS_FILE)
    found = {}
    for key in stored:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            a, b = read_tensor(stored[key]), read_tensor(stored[f"{module}.lora_B.weight"])
            assert fields["r"] == fields["lora_alpha"] == len(a)
            found[module.removeprefix("base_model.model.")] = b @ a
    return found


def merged(out: Path, folders: list[Path], *options: str, monkeypatch: Any) -> dict:
    adapters = ",".join(map(str, folders))
    argv = ["merge", f"--adapters={adapters}", f"--out={out}", *options]
    monkeypatch.setattr(sys, "argv", argv)
    merge.main()
    return products(out)


@pytest.mark.parametrize(
    ("how", "options", "theirs"),
    [
        ("cat", [], {"combination_type": "cat"}),
        ("linear", [], {"combination_type": "linear"}),
        ("ties", ["--density=0.4"], {"combination_type": "ties", "density": 0.4}),
        ("svd", ["--rank=2"], {"combination_type": "svd", "svd_rank": 2}),
    ],
)
def test_peft_combines_the_same(
    two: Any, how: str, options: list, theirs: dict, tmp_path: Path, monkeypatch: Any
):
    model, folders = two
    options = [f"--how={how}", "--weights=0.7,-0.3", *options]
    ours = merged(tmp_path / "out", folders, *options, monkeypatch=monkeypatch)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], how, **theirs)
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert len(ours) == 4
    for module, value in ours.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.{how}.weight"] for x in "AB")
        assert oracle.difference(value, b @ a) <= 1e-5, module


@pytest.mark.parametrize(
    ("path", "stack"), [("layers.0.x", (2,)), ("layers.0.x", (2, 3)), ("x", ())]
)
def test_sums_of_layers_experts_and_what_is_in_no_layer(path: str, stack: tuple[int, ...]):
    random, parts, total = np.random.default_rng(0), [], 0.0
    for rank, weight in ((2, 0.5), (3, -2.0)):
        config = lora.Config(rank=rank, alpha=4.0)
        a, b = random.normal(size=(*stack, 5, rank)), random.normal(size=(*stack, rank, 4))
        choice = {path: (config,) * (stack[0] if stack else 1)}
        params = {f"{path}.adapter.a": a, f"{path}.adapter.b": b}
        parts.append((Adapter(Adapters("lora", config, choice), params, ()), weight))
        total += weight * config.scale * (a @ b)
    one = summed(parts)
    product = one.params[f"{path}.adapter.a"] @ one.params[f"{path}.adapter.b"]
    np.testing.assert_allclose(product, total, rtol=1e-6, atol=1e-6)


def test_dare_keeps_the_mean():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5)), random.normal(size=(4, 2))
    pairs = [Pair(a, b, 0.5), Pair(a, b, 0.5)]
    every = [COMBINATIONS["dare"](pairs, Knobs(9, 0.5, random))[0] for _ in range(4000)]
    assert oracle.difference(np.mean(every, axis=0), 2 * 0.5**0.5 * a) < 0.05
    assert set(np.round(np.stack(every) / (2 * 0.5**0.5 * a), 6).flat) == {0, 1, 2}
    kept = COMBINATIONS["dare_ties"](pairs, Knobs(9, 1.0, random))[0]
    assert oracle.difference(kept, 0.5**0.5 * a) <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights=1"], "2 adapters, but 1 weights"),
        (["--weights=1,x"], "are not numbers"),
        (["--how=ties"], "--density goes with"),
        (["--density=0.5"], "--density goes with"),
        (["--rank=4"], "goes with --how=svd"),
        (["--unmerge=model"], "takes one adapter out"),
        (["--adapters=a", "--unmerge=model", "--weights=1"], "does not read --weights"),
        (["--adapters=a", "--unmerge=model", "--seed=0"], "--seed=0 goes with dare"),
        (["--how=ties", "--density=0.5", "--seed=3"], "--seed=3 goes with dare and dare_ties"),
        (["--base=model"], "--base goes with --unmerge"),
    ],
)
def test_options_without_sense_are_refused(options: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        merge.parse_arguments(["--adapters=a,b", "--out=c", *options])


def test_other_layers_are_refused(two: Any, tmp_path: Path, monkeypatch: Any):
    import peft

    make = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    other = peft.get_peft_model(oracle.hf_llama(), peft.LoraConfig(**make))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightError, match="adapts other layers"):
        merged(tmp_path / "out", [two[1][0], tmp_path / "other"], monkeypatch=monkeypatch)
