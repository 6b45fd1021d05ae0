"""Adapters of whole parameters of experts, made by PEFT."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune import models
from jaxtune.checkpoint.adapter import load_adapter, save_adapter
from jaxtune.checkpoint.adapter_config import CONFIG_FILE
from jaxtune.checkpoint.adapter_merge import merge_adapters
from jaxtune.checkpoint.merging import merged
from jaxtune.errors import WeightError
from jaxtune.peft.combine import Knobs
from jaxtune.schema import Peft
from tests import oracle, tolerances

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def adapted_by_peft(hf: Any, folder: Path, **options: Any) -> Any:
    """The model with an adapter of random numbers, which is saved."""
    import peft
    import torch

    found = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=6, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    found.save_pretrained(str(folder))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {"target_parameters": BOTH, "rank_pattern": {"experts.gate_up_proj": 2}}),
        ("gpt_oss", {"target_parameters": ("model.layers.1.mlp.experts.gate_up_proj",)}),
        ("mixtral", {"target_parameters": BOTH, "layers_to_transform": [0]}),
        ("qwen2_moe", {"target_parameters": BOTH}),
        ("qwen3_moe", {"target_parameters": BOTH[1:]}),
        ("deepseek_v3", {"target_parameters": BOTH}),
    ],
    ids=str,
)
def test_adapters_of_parameters_are_read(tmp_path: Path, family: str, options: dict[str, Any]):
    fields = models.family(family).TINY
    hf = oracle.hf_model({name: value for name, value in fields.items() if value is not None})
    base = oracle.checkpoint_of(hf)
    before = {name: base.read(name).copy() for name in base.tensors}
    lists = {name: list(x) if isinstance(x, tuple) else x for name, x in options.items()}
    targets = ["o_proj"] if family.startswith("deepseek") else ["q_proj"]
    theirs = adapted_by_peft(hf, tmp_path, target_modules=targets, **lists).merge_and_unload()
    expected = oracle.checkpoint_of(theirs)
    ours = merged(dataclasses.replace(base, read=before.__getitem__), tmp_path)
    changed = set()
    for name in base.tensors:
        got, wanted = ours.read(name), expected.read(name)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        changed |= {name} if (got != before[name]).any() else set()
    assert any(".experts." in name for name in changed)
    assert any(targets[0] in name for name in changed)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["target_parameters"]


@pytest.mark.filterwarnings("ignore")
def test_their_pairs_are_not_combined(tmp_path: Path):
    hf = oracle.hf_model(models.family("gpt_oss").TINY)
    adapted_by_peft(hf, tmp_path / "one", target_modules=[], target_parameters=list(BOTH))
    knobs = Knobs(rank=3, density=1.0, random=np.random.default_rng(0))
    with pytest.raises(WeightError, match="adapts parameters of experts"):
        merge_adapters([tmp_path / "one"] * 2, [1, 1], tmp_path / "two", how="cat", knobs=knobs)


@pytest.mark.filterwarnings("ignore")
def test_starts_of_matrices_are_refused(tmp_path: Path):
    hf = oracle.hf_model(models.family("gpt_oss").TINY)
    base = oracle.checkpoint_of(hf)
    adapted_by_peft(hf, tmp_path, target_modules=[], target_parameters=list(BOTH))
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"init_lora_weights": "pissa"}))
    with pytest.raises(WeightError, match=r"=pissa starts .*experts.\w+_proj is one parameter"):
        merged(base, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [("gate_proj", "down_proj"), ("up_proj",), ("down_proj",)])
def test_some_parts_of_experts_in_one_layer_are_written(tmp_path: Path, targets: tuple[str, ...]):
    import peft

    hf, tokens = oracle.hf_model(models.family("gpt_oss").TINY), oracle.random_tokens(1, 2, 9)
    base, without = oracle.checkpoint_of(hf), oracle.hf_logits(hf, tokens)
    loaded = oracle.load(base)
    section = Peft(rank=2, alpha=5.0, target_modules=targets, layers_to_transform=(1,))
    adapted = oracle.adapt(loaded, section)
    params = {**adapted.frozen, **adapted.trainable}
    ours = oracle.model_logits(adapted.skeleton.model(params), tokens)
    assert oracle.difference(ours, without) > 0.01
    place = (loaded.skeleton.abstract(), loaded.weights, loaded.stacks)
    save_adapter(tmp_path / "out", params, adapted.adapters, *place, base="random")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "out")).eval()
    assert oracle.difference(oracle.hf_logits(theirs, tokens), ours) <= tolerances.LOGITS
    back = load_adapter(tmp_path / "out", *place, base=base)
    for path, array in back.params.items():
        mine = params.get(path, np.zeros_like(array))
        np.testing.assert_allclose(array[1], mine[1], rtol=1e-6, err_msg=path)
