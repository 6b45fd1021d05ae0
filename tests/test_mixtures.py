"""Whole runs of small mixtures of experts: trained, resumed, exported, read again by others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune import data, models
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.schema import RunConfig
from jaxtune.train import train
from tests import oracle, test_train, tolerances

# Blocks of 64 rows are quantized, and the tokenizer has 259 tokens.
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 259}
SIZES |= {"intermediate_size": 64, "moe_intermediate_size": 64, "max_position_embeddings": 256}
LORA = {"peft": {"rank": 4}, "train": {"router_aux_loss": 0.01}}
FULL = {"peft": {"method": "full", "rank": 16}}
CASES = [
    ("mixtral", LORA, 2),
    ("mixtral", LORA | {"quant": {"format": ("nf4",)}}, 2),
    ("qwen3_moe", LORA | {"quant": {"format": ("int8",)}}, 2),
    ("qwen3_moe", FULL | {"train": {"router_aux_loss": 0.01}}, 2),
    ("qwen2_moe", FULL | {"optim": {"name": "muon"}}, 2),
    ("deepseek_v3", FULL | {"train": {"router_bias_update_rate": 0.01}}, 2),
]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def base_folder(folder: Path, family: str) -> Path:
    known = models.family(family).TINY
    hf = oracle.hf_model({name: SIZES.get(name, value) for name, value in known.items()})
    stored = oracle.checkpoint_of(hf)
    loaded = oracle.load(stored)
    tokenizer = data.load_tokenizer("tiny:llama")
    save_model(folder, loaded.params, stored, loaded.weights, loaded.stacks, tokenizer=tokenizer)
    return folder


def config_of(folder: Path, run: str, num_steps: int, sections: dict[str, Any]) -> RunConfig:
    steps = {"num_steps": num_steps, "output_dir": str(folder / run)}
    fields = sections | {
        "model": {"path": str(folder / "base")},
        "train": sections.get("train", {}) | steps,
        "optim": {"schedule": "constant"} | sections.get("optim", {}),
        "checkpoint": {"every_steps": 2, "export_merged": True},
    }
    return test_train.run_config(folder, run, **fields)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: array for part in found for name, array in part.items()}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of the ranks that it makes up itself
@pytest.mark.parametrize(
    ("family", "sections", "first_steps"),
    [(*CASES[0][:2], 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
    ids=str,
)
def test_a_run_resumes_and_others_read_it(
    tmp_path: Path, family: str, sections: dict[str, Any], first_steps: int
):
    import peft
    import transformers

    base = base_folder(tmp_path / "base", family)
    result = train(config_of(tmp_path, "run", 4, sections))
    lines = map(json.loads, result.paths["metrics"].read_text().splitlines())
    losses = [row["loss"] for row in lines if row["split"] == "train"]
    assert losses[-1] < losses[0]
    merged = tensors(result.paths["merged"])
    if first_steps:
        for steps in (first_steps, 4):
            parts = train(config_of(tmp_path, "parts", steps, sections))
        for name, array in tensors(parts.paths["merged"]).items():
            np.testing.assert_array_equal(array, merged[name], err_msg=name)
    moved = {name for name, array in tensors(base).items() if (array != merged[name]).any()}
    assert any(".experts." in name for name in moved)
    assert any("e_score" in name for name in moved) == (family == "deepseek_v3")

    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = oracle.random_tokens(0, 2, 16)
    theirs = oracle.hf_logits(load(result.paths["merged"]).eval(), tokens)
    ours = oracle.logits(oracle.load(open_checkpoint(str(result.paths["merged"]))), tokens)
    assert oracle.difference(ours, theirs) <= tolerances.LOGITS
    if "adapter" in result.paths and "quant" not in sections:
        adapted = peft.PeftModel.from_pretrained(load(base), str(result.paths["adapter"])).eval()
        assert oracle.difference(oracle.hf_logits(adapted, tokens), theirs) <= tolerances.LOGITS
