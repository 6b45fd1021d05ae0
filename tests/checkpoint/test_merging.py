"""Merged weights: how far they are off, and the base taken out of them again."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import build, data, merge, peft
from jaxtune.checkpoint.adapter import save_adapter
from jaxtune.checkpoint.adapter_config import CONFIG_FILE
from jaxtune.checkpoint.folder import RECORD_FILE
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.merging import ADDITIVE, FACTORS, merged, unmerged
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import ConfigError
from jaxtune.schema import Data, Objective, Peft, RunConfig
from jaxtune.sharding.mesh import make_mesh
from tests import oracle

SOME = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return oracle.checkpoint_of(oracle.hf_llama(attention_bias=True, mlp_bias=True))


def write(base: Checkpoint, folder: Path, options: Peft, **saving: Any) -> Path:
    """A random adapter and the model into which it is merged, in two folders; returns `folder`."""
    loaded = oracle.load(base, layers="scan")
    adapted = oracle.adapt(loaded, options)
    random = np.random.default_rng(2)
    params = {
        name: np.asarray(array) + random.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in adapted.trainable.items()
    }
    where, shapes = (loaded.weights, loaded.stacks), loaded.skeleton.abstract()
    save_adapter(folder / "adapter", params, adapted.adapters, shapes, *where, base="random")
    tokenizer = data.load_tokenizer("tiny:llama")
    saving |= {"adapters": adapted.adapters, "tokenizer": tokenizer}
    save_model(folder / "merged", params, base, *where, **saving)
    return folder


@pytest.mark.parametrize("method", [*ADDITIVE, *FACTORS])
def test_the_base_comes_out_again(base: Checkpoint, method: str, tmp_path: Path):
    options = Peft(method=method, rank=4, target_modules=SOME, lora_bias=method == "lora")
    write(base, tmp_path, options)
    written = open_checkpoint(str(tmp_path / "merged"))
    read, found = merged(base, tmp_path / "adapter"), unmerged(written, tmp_path / "adapter")
    assert found.tensors == base.tensors
    changed = 0
    for name in base.tensors:
        changed += oracle.difference(written.read(name), base.read(name)) > 1e-3
        np.testing.assert_array_equal(read.read(name), written.read(name))
        assert oracle.difference(found.read(name), base.read(name)) <= 1e-6, name
    assert changed >= 2 * len(SOME)


def test_errors_of_rounding_are_noted_and_bounded(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    options = Peft(rank=4, target_modules=SOME)
    write(base, tmp_path / "exact", options)
    write(base, tmp_path / "rounded", options, dtype="bfloat16")
    exact, rounded = (open_checkpoint(str(tmp_path / k / "merged")) for k in ("exact", "rounded"))
    names = [name for name in base.tensors if (exact.read(name) != base.read(name)).any()]
    norm = np.linalg.norm
    errors = {n: norm(rounded.read(n).astype(np.float32) - exact.read(n)) for n in names}
    relative = [errors[name] / norm(exact.read(name)) for name in names]
    shares = [errors[name] / norm(exact.read(name) - base.read(name)) for name in names]
    notes = [
        json.loads((tmp_path / kind / "merged" / RECORD_FILE).read_text())
        for kind in ("exact", "rounded")
    ]
    assert [note["merge_base"] for note in notes] == ["original"] * 2
    assert notes[0]["merge"]["relative_error"]["worst"] == 0
    found = notes[1]["merge"]
    assert found["tensors"] == len(names) == 2 * len(SOME)
    for key, values in (("relative_error", relative), ("share_of_change", shares)):
        assert found[key]["mean"] == pytest.approx(np.mean(values), rel=1e-4)
        assert found[key]["worst"] == pytest.approx(max(values), rel=1e-4)
    assert 1e-3 < found["relative_error"]["mean"] < 2**-9
    assert "off on average" in capsys.readouterr().out

    arguments = [f"--unmerge={rounded.name}", f"--adapters={tmp_path / 'rounded' / 'adapter'}"]
    monkeypatch.setattr(sys, "argv", ["merge", *arguments, f"--out={tmp_path / 'base'}"])
    sys.argv.append(f"--base={tmp_path / 'exact' / 'merged'}")
    merge.main()
    printed = capsys.readouterr().out
    assert "each entry within 3.9e-03" in printed and "differs from" in printed
    again = open_checkpoint(str(tmp_path / "base"))
    for name in names:
        off = np.abs(again.read(name).astype(np.float32) - base.read(name))
        size = np.abs(rounded.read(name).astype(np.float32)) + np.abs(base.read(name))
        assert (off <= 1.01 * 2**-8 * size).all(), name


def test_another_base_is_warned_of(base: Checkpoint, tmp_path: Path, capsys: Any):
    path = write(base, tmp_path, Peft(rank=2, target_modules=SOME)) / "adapter" / CONFIG_FILE
    for trained_on, used_on, warns in (
        ("org/m", "folder/m", False),
        ("m", "other", True),
        ("m + runs/a/adapter", "org/m + runs/a/adapter", False),
        ("m + runs/a/adapter", "m + runs/b/adapter", True),
        ("m + runs/a/adapter", "other + runs/a/adapter", True),
    ):
        fields = json.loads(path.read_text()) | {"base_model_name_or_path": trained_on}
        path.write_text(json.dumps(fields))
        merged(dataclasses.replace(base, name=used_on), path.parent)
        assert ("was trained on" in capsys.readouterr().err) == warns, (trained_on, used_on)


def test_an_embedding_without_a_head_of_a_language_model(tmp_path: Path):
    encoder = open_checkpoint("tiny:bert")
    folder = write(encoder, tmp_path, Peft(rank=2, target_modules=("embed", "q_proj"))) / "adapter"
    written, read = open_checkpoint(str(tmp_path / "merged")), merged(encoder, folder)
    name = "bert.embeddings.word_embeddings.weight"
    assert oracle.difference(read.read(name), encoder.read(name)) > 1e-3
    np.testing.assert_array_equal(read.read(name), written.read(name))
    # An adapter without a head is merged before the objective's head is put on.
    objective = Objective(name="sequence_classification", labels=("a", "b"))
    pooler = {"modules_to_save": ("pooler",), "exclude_modules": ("pooler",)}
    section = Peft(merged_adapters=(str(folder),), rank=2, **pooler)
    config = RunConfig(objective=objective, peft=section, data=Data(train=("rows.jsonl",)))
    run = build.describe(config, make_mesh({"data": 1}, jax.devices()[:1]), encoder)
    assert run.checkpoint.tensors["classifier.weight"].shape == (2, 32)
    np.testing.assert_array_equal(run.checkpoint.read(name), written.read(name))


def test_training_goes_on_from_several_adapters(base: Checkpoint, tmp_path: Path):
    some = Peft(rank=4, target_modules=SOME)
    first, second = (write(base, tmp_path / kind, some) / "adapter" for kind in "ab")
    section = Peft(merged_adapters=(str(first),), adapter=str(second))
    config = RunConfig(peft=section, data=Data(train=("rows.jsonl",)))
    run = build.describe(config, make_mesh({"data": 1}, jax.devices()[:1]), base)
    values = build.fill_base(run, lambda done, total: None)
    values |= build.fill_adapter(run, values)
    where = (run.checkpoint, run.family.weights(run.model_config), run.stacks)
    learnt = {name: values[name] for name in run.trainable}
    save_model(tmp_path / "both", learnt, *where, adapters=run.adapters)
    both, expected = open_checkpoint(str(tmp_path / "both")), merged(merged(base, first), second)
    for name in base.tensors:
        assert oracle.difference(both.read(name), expected.read(name)) <= 1e-6, name
    kernel = values["layers.0.attn.q_proj.kernel"][1]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert oracle.difference(kernel, merged(base, first).read(name).T) <= 1e-6
    assert run.checkpoint.name == f"random + {first}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dora"}, "holds a dora adapter"),
        ({"modules_to_save": ("norm",)}, "replaces norm.scale"),
        ({"trainable_tokens": (3,)}, "replaces embed, lm_head"),
    ],
)
def test_what_cannot_be_told_from_merged_weights(
    base: Checkpoint, options: dict[str, Any], message: str, tmp_path: Path
):
    loaded = oracle.load(base, layers="scan")
    section = Peft(**{"rank": 2, "target_modules": SOME} | options)
    adapters = peft.choose_adapters(loaded.skeleton.model(loaded.skeleton.abstract()), section)
    shapes = loaded.skeleton.abstract()
    params = {name: np.ones(leaf.shape, np.float32) for name, leaf in shapes.items()}
    for path, configs in adapters.layers.items():
        *stack, d_in, d_out = shapes[peft.weight_name(path)].shape
        tensors = peft.module_of(adapters, path).tensors(configs[0], d_in, d_out)
        for leaf, tensor in tensors.items():
            params[f"{path}.adapter.{leaf}"] = np.ones((*stack, *tensor.shape), np.float32)
    where = (loaded.weights, loaded.stacks)
    save_adapter(tmp_path, params, adapters, shapes, *where, base="random")
    with pytest.raises(ConfigError, match=message):
        unmerged(base, tmp_path)
    coded = dataclasses.replace(base, quantized={"a": None})
    with pytest.raises(ConfigError, match="is quantized"):
        unmerged(coded, tmp_path)
