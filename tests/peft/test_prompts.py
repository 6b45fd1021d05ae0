"""Prefix, prompt and P-tuning: PEFT's numbers and folders, packed rows, layouts, whole runs."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune import objectives, tree
from jaxtune.checkpoint.adapter import load_adapter
from jaxtune.checkpoint.adapter_file import WEIGHTS_FILE
from jaxtune.checkpoint.adapter_slot import save_slot
from jaxtune.checkpoint.safetensors import read_header, read_tensor
from jaxtune.data.batch import TokenBatch, TokenRow
from jaxtune.data.packing import stack_rows
from jaxtune.errors import ConfigError, WeightError
from jaxtune.infer import Sampling, generate
from jaxtune.infer.engine import score
from jaxtune.peft import METHODS
from jaxtune.peft.base import PROMPT
from jaxtune.schema import Peft
from jaxtune.train import train
from tests import oracle, test_train, tolerances

# peft asks transformers for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

LENGTH = 5
SHAPES = {"head_dim": 12, "attention_bias": True}  # 4 heads of a width of 32, 2 key heads
CASES = {
    "prefix": Peft(method="prefix", num_virtual_tokens=LENGTH),
    "projection": Peft(
        method="prefix", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=7
    ),
    "prompt": Peft(method="prompt", num_virtual_tokens=LENGTH),
    "mlp": Peft(method="p_tuning", num_virtual_tokens=LENGTH, encoder_hidden_size=6),
    "lstm": Peft(method="p_tuning", num_virtual_tokens=LENGTH, encoder="lstm"),
}
TOKENS = oracle.random_tokens(1, 2, 9)


def peft_config(case: str) -> Any:
    """What PEFT calls the method of a case."""
    import peft as theirs

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
    kinds = {
        "prefix": lambda: theirs.PrefixTuningConfig(**common),
        "projection": lambda: theirs.PrefixTuningConfig(
            **common, prefix_projection=True, encoder_hidden_size=7
        ),
        "prompt": lambda: theirs.PromptTuningConfig(**common),
        "mlp": lambda: theirs.PromptEncoderConfig(**common, encoder_hidden_size=6),
        "lstm": lambda: theirs.PromptEncoderConfig(
            **common, encoder_reparameterization_type="LSTM"
        ),
    }
    return kinds[case]()


@pytest.fixture(scope="module")
def hf() -> Any:
    pytest.importorskip("peft")
    return oracle.hf_llama(**SHAPES)


@pytest.fixture(scope="module")
def loaded(hf: Any) -> oracle.Loaded:
    return oracle.load(oracle.checkpoint_of(hf))


def forward(skeleton: tree.Skeleton, params: tree.Params) -> np.ndarray:
    """Logits of TOKENS."""
    return score(skeleton, params, TOKENS, np.ones_like(TOKENS, bool))


def answers(skeleton: tree.Skeleton, params: tree.Params) -> list[list[int]]:
    prompts = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    return generate(skeleton, params, prompts, max_new_tokens=8, eos_ids=(), sampling=Sampling())


def hf_answers(model: Any) -> list[list[int]]:
    import torch

    found = []
    for prompt in (TOKENS[0], TOKENS[1, :4]):
        given = torch.tensor(prompt[None]).long()
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def finished(loaded: oracle.Loaded) -> dict[str, oracle.Adapted]:
    """Models with a prefix and with a prompt, no networks; compiled for once."""
    return {case: oracle.adapt(loaded, CASES[case]) for case in ("prefix", "prompt")}


def table(adapted: oracle.Adapted) -> np.ndarray:
    model = adapted.skeleton.model({**adapted.frozen, **adapted.trainable})
    return np.asarray(METHODS[adapted.adapters.method].stored(model)[PROMPT])


@pytest.mark.parametrize("case", CASES)
def test_folders_are_those_of_peft(
    case: str, hf: Any, loaded: oracle.Loaded, finished: dict, tmp_path: Path
) -> None:
    """What PEFT saved gives PEFT's logits here, what we save gives ours there; answers too."""
    import peft as theirs

    def read(folder: Path) -> tuple[tree.Skeleton, tree.Params]:
        shapes, weights = loaded.skeleton.abstract(), loaded.weights
        base = oracle.checkpoint_of(hf)
        adapter = load_adapter(folder, shapes, weights, loaded.stacks, base=base)
        model = finished[adapter.adapters.method]
        assert adapter.adapters == model.adapters
        return model.skeleton, {**model.frozen, **jax.tree.map(jnp.asarray, adapter.params)}

    model = theirs.get_peft_model(copy.deepcopy(hf), peft_config(case)).eval()
    model.save_pretrained(tmp_path / "theirs")
    skeleton, params = read(tmp_path / "theirs")
    expected = oracle.hf_logits(model, TOKENS)[:, -TOKENS.shape[1] :]
    assert oracle.difference(forward(skeleton, params), expected) <= tolerances.LOGITS
    if case in finished:
        assert answers(skeleton, params) == hf_answers(model)

    ours = oracle.adapt(loaded, CASES[case])
    save_slot(tmp_path / "ours", {PROMPT: table(ours)}, ours.adapters, base="random")
    found = forward(*read(tmp_path / "ours"))
    there = theirs.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours").eval()
    expected = oracle.hf_logits(there, TOKENS)[:, -TOKENS.shape[1] :]
    assert oracle.difference(found, expected) <= tolerances.LOGITS
    assert oracle.difference(found, oracle.hf_logits(hf, TOKENS)) > 0.01
    first, second = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    assert first.keys() == second.keys()


def test_folders_that_do_not_fit_are_refused(
    hf: Any, loaded: oracle.Loaded, finished: dict, tmp_path: Path
) -> None:
    adapted = finished["prefix"]
    save_slot(tmp_path, {PROMPT: table(adapted)[:, 1:]}, adapted.adapters, base="random")
    shapes, weights = loaded.skeleton.abstract(), loaded.weights
    with pytest.raises(
        WeightError, match=r"wrong shape: prompt_embeddings is \[5, 95\].*\[5, 96\]"
    ):
        base = oracle.checkpoint_of(hf)
        load_adapter(tmp_path, shapes, weights, loaded.stacks, base=base)


def torch_names(case: str) -> dict[str, tuple[str, ...]]:
    """Name of each variable of a network -> PEFT's, whose sum it is (torch has two biases)."""
    linears = {
        "projection": {"hidden": "transform.0"},
        "mlp": {"first": "mlp_head.0", "second": "mlp_head.2", "third": "mlp_head.4"},
        "lstm": {"first": "mlp_head.0", "second": "mlp_head.2"},
    }[case]
    names: dict[str, tuple[str, ...]] = {"embedding": ("embedding.weight",)}
    for ours, theirs in linears.items():
        names |= {f"{ours}.kernel": (f"{theirs}.weight",), f"{ours}.bias": (f"{theirs}.bias",)}
    for layer in range(2 if case == "lstm" else 0):
        for ours, end in (("forward", ""), ("backward", "_reverse")):
            at, there = f"lstm.{ours}.{layer}", f"l{layer}{end}"
            names[f"{at}.inputs"] = (f"lstm_head.weight_ih_{there}",)
            names[f"{at}.recurrent"] = (f"lstm_head.weight_hh_{there}",)
            names[f"{at}.gate_bias"] = tuple(f"lstm_head.bias_{x}h_{there}" for x in "ih")
    return names


@pytest.mark.parametrize("case", ["projection", "mlp", "lstm"])
def test_networks_are_those_of_peft(case: str, hf: Any, loaded: oracle.Loaded) -> None:
    import peft as theirs

    model = theirs.get_peft_model(copy.deepcopy(hf), peft_config(case))
    encoder = model.prompt_encoder["default"]
    weights = {name: p.detach().numpy() for name, p in encoder.named_parameters()}
    ours = oracle.adapt(loaded, CASES[case])
    slot = f"{METHODS[ours.adapters.method].SLOT}."
    values = {
        f"{slot}{name}": sum(weights[part] for part in parts)
        for name, parts in torch_names(case).items()
    }
    values = {n: x if n.endswith("embedding") else x.T for n, x in values.items()}
    if case == "projection":
        kernel = weights["transform.2.weight"].reshape(2, 2, -1, 7)  # layers, keys and values
        bias = weights["transform.2.bias"].reshape(2, 2, -1)
        for i, leaf in enumerate(("keys", "values")):
            values[f"{slot}{leaf}.kernel"] = kernel[:, i].swapaxes(1, 2)
            values[f"{slot}{leaf}.bias"] = bias[:, i]
    assert values.keys() == ours.trainable.keys()
    assert all(values[name].shape == x.shape for name, x in ours.trainable.items())
    found = table(ours._replace(trainable=jax.tree.map(jnp.asarray, values)))
    expected = model.get_prompt_embedding_to_save("default").numpy()
    assert oracle.difference(found, expected) <= tolerances.OPS_LONG_SUMS


def rows(virtual: int) -> list[TokenRow]:
    """Examples of 7, 4 and 9 tokens behind the places of virtual ones."""
    found = []
    for seed, length in enumerate((7, 4, 9)):
        tokens = np.pad(oracle.random_tokens(seed, length), (virtual, 0))
        found.append(TokenRow(tokens, np.arange(len(tokens)) > virtual + 1))
    return found


@pytest.mark.parametrize("case", ["prefix", "prompt"])
@pytest.mark.parametrize("layers", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
def test_packed_examples_all_see_the_prompt(case: str, layers: str, hf: Any) -> None:
    """The loss and its gradients of a packed row are the sums of those of its examples."""
    adapted = oracle.adapt(oracle.load(oracle.checkpoint_of(hf), layers=layers), CASES[case])

    @jax.jit
    @jax.value_and_grad
    def loss(trainable: tree.Params, batch: TokenBatch) -> jax.Array:
        model = adapted.skeleton.model({**adapted.frozen, **trainable})
        return objectives.OBJECTIVES["sft"](model, batch, loss_dtype=jnp.float32)[0]

    examples = rows(LENGTH if case == "prompt" else 0)
    packed, gradients = loss(adapted.trainable, stack_rows([examples], 40))
    alone = [loss(adapted.trainable, stack_rows([[example]], 40)) for example in examples]
    expected, sums = jax.tree.map(lambda *parts: sum(parts), *alone)
    assert float(packed) == pytest.approx(float(expected), rel=tolerances.LOSS_CURVE)
    for name, gradient in sums.items():
        assert np.abs(gradient).max() > 0
        assert oracle.difference(gradients[name], gradient) <= tolerances.GRADIENTS, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": {"rank": 8}}, "rank=8 would be ignored"),
        ({"peft": {"prompt_init": "zero"}}, "choose random or vocab or text"),
        ({"peft": {"prompt_init": "text"}}, "need each other"),
        ({"peft": {"encoder_num_layers": 3, "method": "p_tuning"}}, "only encoder=lstm"),
        ({"peft": {"encoder_hidden_size": 3, "method": "prefix"}}, "needs prefix_projection"),
        ({"data": {"max_seq_len": 32}}, "more than half"),
        ({"data": {"packer": "concat"}}, "another data.packer"),
        ({"checkpoint": {"export_merged": True}}, "nothing to merge"),
        ({"peft": {"method": "prefix"}, "mesh": {"sequence": 2}}, "mesh.sequence=2"),
        ({"peft": {"method": "prefix"}, "model": {"attention": "splash"}}, "leave it at auto"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    sections = {"peft": {"method": "prompt", "rank": Peft().rank}}
    for name, fields in changes.items():
        sections[name] = sections.get(name, {}) | fields
    with pytest.raises(ConfigError, match=message):
        train(test_train.run_config(tmp_path, "run", **sections))


RUNS = {
    "prefix": {"method": "prefix"},
    "projection": {"method": "prefix", "prefix_projection": True, "prompt_init": "zero"},
    "vocab": {"method": "prompt", "prompt_init": "vocab"},
    "text": {"method": "prompt", "prompt_init": "text", "prompt_init_text": "one two red"},
    "mlp": {"method": "p_tuning"},
    "lstm": {"method": "p_tuning", "encoder": "lstm"},
}


def test_a_prompt_starts_as_a_text(tmp_path: Path) -> None:
    """A run by the command's way, of one step with a learning rate of zero."""
    sections = {
        "peft": {"rank": Peft().rank, "num_virtual_tokens": 6} | RUNS["text"],
        "data": {"eval": ()},
        "optim": {"learning_rate": 0.0},
        "train": {"num_steps": 1},
        "mesh": {"fsdp": 8},
    }
    result = train(test_train.run_config(tmp_path, "run", **sections))
    tensors = read_header(result.paths["adapter"] / WEIGHTS_FILE)
    assert list(tensors) == ["prompt_embeddings"]
    model = jaxtune.load("tiny:llama", adapter=result.paths["adapter"])
    ids = np.resize(model.tokenizer("one two red").input_ids, 6)
    start = np.asarray(model.params["embed.table"])[ids]
    np.testing.assert_array_equal(read_tensor(tensors["prompt_embeddings"]), start)


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_a_run_from_start_to_answers(case: str, tmp_path: Path) -> None:
    """Trains, stops, goes on bit for bit, and its folder answers as the run did."""
    sections = {
        "peft": {"rank": Peft().rank, "num_virtual_tokens": 6} | RUNS[case],
        "eval": {"exact_match": True, "max_rows": 2, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "mesh": {"fsdp": 4, "tensor": 2},
        "quant": {"format": ("int8",)} if case == "vocab" else {},
    }
    whole = train(test_train.run_config(tmp_path, "whole", **sections))
    rows = [json.loads(line) for line in whole.paths["metrics"].read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if row["split"] == "train")
    tensors = read_header(whole.paths["adapter"] / WEIGHTS_FILE)
    assert list(tensors) == ["prompt_embeddings"]
    samples = [json.loads(line) for line in whole.paths["samples"].read_text().splitlines()]
    model = jaxtune.load("tiny:llama", adapter=whole.paths["adapter"])
    prompts = [[{"role": "user", "content": sample["prompt"]}] for sample in samples]
    if not sections["quant"]:
        assert model.generate(prompts, max_new_tokens=4) == [s["answer"] for s in samples]

    sections["checkpoint"] |= {"resume": "2"}
    again = train(test_train.run_config(tmp_path, "whole", **sections))
    found = read_tensor(read_header(again.paths["adapter"] / WEIGHTS_FILE)["prompt_embeddings"])
    np.testing.assert_array_equal(found, read_tensor(tensors["prompt_embeddings"]))
