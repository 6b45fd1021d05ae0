import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import peft as methods
from jaxtune import tree
from jaxtune.checkpoint.adapter import load_adapter, save_adapter
from jaxtune.checkpoint.adapter_file import WEIGHTS_FILE
from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.safetensors import read_header, read_tensor, write_folder
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import ConfigError, WeightError
from jaxtune.schema import Peft

LAYOUTS = ("scan", "unroll")
ALL = Peft(rank=4, alpha=8.0)


def targeting(*names: str, layers: tuple[int, ...] = ()) -> Peft:
    return dataclasses.replace(ALL, target_modules=names, layers_to_transform=layers)


class Adapted:
    """A tiny model with random, non-zero adapters."""

    def __init__(self, describe: Callable, layers: str, options: Peft):
        self.checkpoint = open_checkpoint("tiny:llama")
        self.model = describe(self.checkpoint, layers)
        module = self.model.skeleton.model(self.model.abstract)
        self.adapters = methods.choose_adapters(module, options)
        random = np.random.default_rng(1)
        self.params: dict[str, Any] = {}
        for path, configs in self.adapters.choice.items():
            *stack, d_in, d_out = self.model.abstract[f"{path}.kernel"].shape
            mask = np.array([config is not None for config in configs])
            mask = mask.reshape(-1, 1, 1) if stack else mask[0]
            for leaf, shape in (("a", (d_in, options.rank)), ("b", (options.rank, d_out))):
                value = random.normal(size=(*stack, *shape)).astype(np.float32)
                self.params[f"{path}.adapter.{leaf}"] = np.where(mask, value, 0)

    def save(self, folder: Path, base: str = "tiny:llama") -> Path:
        model = self.model
        save_adapter(
            folder,
            self.params,
            self.adapters,
            model.abstract,
            model.weights,
            model.stacks,
            base=base,
        )
        return folder

    def load(self, folder: Path, base: str = "tiny:llama") -> Any:
        model, named = self.model, dataclasses.replace(self.checkpoint, name=base)
        return load_adapter(folder, model.abstract, model.weights, model.stacks, base=named)


@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize(
    ("targets", "names", "to_transform"),
    [
        (
            ALL,
            "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
            None,
        ),
        (targeting("q_proj", "v_proj"), "q_proj v_proj", None),
        (targeting("q_proj", layers=(0, 2)), "q_proj", [0, 2]),
        (
            targeting("q_proj", "layers.1.mlp.up_proj"),
            "model.layers.0.self_attn.q_proj model.layers.1.mlp.up_proj "
            "model.layers.1.self_attn.q_proj model.layers.2.self_attn.q_proj",
            None,
        ),
    ],
)
def test_round_trip(
    tmp_path: Path,
    layers: str,
    targets: Peft,
    names: str,
    to_transform: list | None,
    describe: Callable,
):
    adapted = Adapted(describe, layers, targets)
    folder = adapted.save(tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["target_modules"] == names.split()
    assert fields["layers_to_transform"] == to_transform
    loaded = adapted.load(folder)
    assert loaded.adapters == adapted.adapters
    assert loaded.warnings == ()
    assert set(loaded.params) == set(adapted.params)
    for path, array in adapted.params.items():
        assert loaded.params[path].dtype == np.float32
        np.testing.assert_array_equal(loaded.params[path], array)


def test_layouts_write_the_same_files(tmp_path: Path, describe: Callable):
    scan = Adapted(describe, "scan", ALL)
    unroll = Adapted(describe, "unroll", ALL)
    for path in unroll.params:
        parts = path.split(".")
        stacked = ".".join([parts[0], "0", *parts[2:]])
        unroll.params[path] = scan.params[stacked][int(parts[1])][None]
    files = [
        adapted.save(tmp_path / name) / WEIGHTS_FILE
        for adapted, name in [(scan, "s"), (unroll, "u")]
    ]
    first, second = ({k: read_tensor(v) for k, v in read_header(file).items()} for file in files)
    assert set(first) == set(second)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_rslora_and_dropout_are_kept(tmp_path: Path, describe: Callable):
    adapted = Adapted(describe, "scan", Peft(rank=2, alpha=3.5, rslora=True, dropout=0.1))
    loaded = adapted.load(adapted.save(tmp_path / "adapter"))
    assert loaded.adapters == adapted.adapters
    np.testing.assert_allclose(loaded.adapters.config.scale, 3.5 / np.sqrt(2), rtol=1e-6)


def test_another_base_name_is_a_warning(tmp_path: Path, describe: Callable):
    adapted = Adapted(describe, "scan", ALL)
    folder = adapted.save(tmp_path / "adapter", base="meta-llama/Llama-3.2-1B")
    (warning,) = adapted.load(folder).warnings
    assert "meta-llama/Llama-3.2-1B" in warning
    assert adapted.load(folder, base="/models/Llama-3.2-1B").warnings == ()


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    arrays = {k: read_tensor(v) for k, v in read_header(folder / WEIGHTS_FILE).items()}
    change(arrays)
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    write_folder(folder, infos, arrays.__getitem__, stem="adapter_model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "POLY"}, "peft_type 'POLY' is not supported"),
        ({"use_dora": True}, "missing: .*lora_magnitude_vector"),
        ({"bias": "some"}, 'bias="some"'),
        ({"modules_to_save": ["lm_head"]}, "missing: base_model.model.lm_head.weight"),
        ({"lora_use_mixer": True}, "lora_use_mixer=true"),
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT draws another one at every load"),
        ({"trainable_token_indices": [3, 259]}, "token 259 trains, and the base has 259 tokens"),
        ({"trainable_token_indices": {"norm": [3]}}, "tokens train in norm, which is not this"),
        ({"r": 8}, "wrong shape"),
        ({"r": "4"}, "not numbers"),
        ({"target_modules": ["c_attn", "q_proj"]}, r"\['c_attn'\] are not in this base"),
        ({"target_modules": None}, "are not in this base"),
        ({"target_modules": ["lm_head", "q_proj"]}, "adapts lm_head"),
        (
            {"target_modules": ["q_proj"]},
            "unexpected: base_model.model.model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_unsupported_config(tmp_path: Path, fields: dict, message: str, describe: Callable):
    adapted = Adapted(describe, "scan", ALL)
    folder = adapted.save(tmp_path / "adapter")
    edit_config(folder, **fields)
    with pytest.raises(WeightError, match=message):
        adapted.load(folder)


def test_all_wrong_tensors_are_listed(tmp_path: Path, describe: Callable):
    adapted = Adapted(describe, "scan", ALL)
    folder = adapted.save(tmp_path / "adapter")
    layer = "base_model.model.model.layers.1.self_attn."

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        del arrays[layer + "q_proj.lora_A.weight"]
        arrays[layer + "extra.weight"] = np.zeros(2, np.float32)
        arrays[layer + "k_proj.lora_A.weight"] = np.zeros((4, 33), np.float32)
        arrays[layer + "v_proj.lora_B.weight"] = np.full((16, 4), np.nan, np.float32)

    edit_weights(folder, spoil)
    with pytest.raises(WeightError) as caught:
        adapted.load(folder)
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        f"missing: {layer}q_proj.lora_A.weight",
        f"unexpected: {layer}extra.weight",
        f"wrong shape: {layer}k_proj.lora_A.weight is [4, 33], base and r ask for [4, 32]",
        f"NaN or infinity: {layer}v_proj.lora_B.weight",
    }


def test_not_an_adapter(tmp_path: Path, describe: Callable):
    adapted = Adapted(describe, "scan", ALL)
    with pytest.raises(WeightError, match="not a PEFT adapter"):
        adapted.load(tmp_path / "absent")
    folder = adapted.save(tmp_path / "adapter")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightError, match="holds no adapter_model.safetensors"):
        adapted.load(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightError, match="refused unread"):
        adapted.load(folder)


def test_unknown_folder_is_not_overwritten(tmp_path: Path, describe: Callable):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="did not export"):
        Adapted(describe, "scan", ALL).save(tmp_path)


def merged_folder(adapted: Adapted, base: Any, folder: Path) -> Path:
    model = adapted.model
    params = load_weights(base, model.weights, model.abstract, model.stacks) | adapted.params
    save_model(folder, params, base, model.weights, model.stacks, adapters=adapted.adapters)
    return folder


@pytest.fixture
def base_folder(tmp_path: Path, describe: Callable) -> Path:
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, "scan")
    params = load_weights(tiny, model.weights, model.abstract, model.stacks)
    save_model(tmp_path / "base", params, tiny, model.weights, model.stacks)
    return tmp_path / "base"


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def our_logits(adapted: Adapted, params: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    abstract = adapted.model

    def build() -> Any:
        module = abstract.skeleton.model(abstract.abstract)
        methods.attach(module, adapted.adapters)
        return module

    skeleton = tree.describe(build)
    constants = {
        name: methods.initial_value(name, leaf.shape, adapted.adapters, abstract.stacks, 0)
        for name, leaf in skeleton.abstract().items()
        if name not in params
    }
    model = skeleton.model(params | constants)
    hidden, _ = model.hidden(ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), None)
    return np.asarray(model.logits(hidden))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize(
    "targets",
    [
        ALL,
        targeting("q_proj", "mlp.down_proj", layers=(0, 2)),
        targeting("v_proj", "layers.1.mlp.up_proj"),
    ],
)
def test_peft_computes_the_same(
    tmp_path: Path, layers: str, targets: Peft, base_folder: Path, describe: Callable
):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    adapted = Adapted(describe, layers, targets)
    folder = adapted.save(tmp_path / "adapter", base=str(base_folder))
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    without = torch_logits(base, ids)
    theirs = peft.PeftModel.from_pretrained(base, folder)
    expected = torch_logits(theirs, ids)
    scale = np.abs(expected).max()
    assert np.abs(expected - without).max() > 0.1 * scale
    model, source = adapted.model, open_checkpoint(str(base_folder))
    params = load_weights(source, model.weights, model.abstract, model.stacks) | adapted.params
    assert np.abs(our_logits(adapted, params, ids) - expected).max() <= 1e-4 * scale
    merged = merged_folder(adapted, source, tmp_path / "merged")
    merged_model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert np.abs(torch_logits(merged_model, ids) - expected).max() <= 1e-4 * scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(0|2)\.self_attn\.[qv]_proj", "use_rslora": True},
        {"target_modules": ["self_attn.o_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    ],
)
def test_import_from_peft(
    tmp_path: Path, layers: str, options: dict, base_folder: Path, describe: Callable
):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(str(base_folder))
    adapted = Adapted(describe, layers, ALL)
    loaded = adapted.load(tmp_path / "theirs", base=str(base_folder))
    assert loaded.warnings == ()
    adapted.adapters, adapted.params = loaded.adapters, loaded.params
    model = adapted.model
    params = load_weights(source, model.weights, model.abstract, model.stacks) | loaded.params
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    expected = torch_logits(theirs, ids)
    assert (
        np.abs(our_logits(adapted, params, ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    )
    back = adapted.save(tmp_path / "back", base=str(base_folder))
    before, after = (read_header(folder / WEIGHTS_FILE) for folder in (tmp_path / "theirs", back))
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(read_tensor(before[key]), read_tensor(after[key]))


@pytest.mark.parametrize("layers", LAYOUTS)
def test_merging_copies_the_base_from_its_files(tmp_path: Path, layers: str, describe: Callable):
    targets = targeting("q_proj")
    adapted = Adapted(describe, layers, targets)
    model, tiny = adapted.model, adapted.checkpoint
    rounded = load_weights(
        tiny,
        model.weights,
        {
            path: jax.ShapeDtypeStruct(leaf.shape, "bfloat16")
            for path, leaf in model.abstract.items()
        },
        model.stacks,
    )
    options = {"adapters": adapted.adapters}
    save_model(tmp_path / "files", adapted.params, tiny, model.weights, model.stacks, **options)
    everything = rounded | adapted.params
    save_model(tmp_path / "arrays", everything, tiny, model.weights, model.stacks, **options)
    exact, lossy = (open_checkpoint(str(tmp_path / name)) for name in ("files", "arrays"))
    assert set(exact.tensors) == set(lossy.tensors) == set(tiny.tensors)
    for name in tiny.tensors:
        difference = exact.read(name) - tiny.read(name)
        if name.endswith("q_proj.weight"):
            assert np.abs(difference).max() > 0.1
        else:
            assert not difference.any()
        np.testing.assert_allclose(exact.read(name), lossy.read(name), atol=0.01)
    assert (
        exact.read("model.embed_tokens.weight").tolist()
        != lossy.read("model.embed_tokens.weight").tolist()
    )


@pytest.mark.filterwarnings("ignore")
def test_config_has_the_fields_that_peft_writes(tmp_path: Path, describe: Callable):
    peft = pytest.importorskip("peft")
    folder = Adapted(describe, "scan", ALL).save(tmp_path / "adapter")
    ours = json.loads((folder / "adapter_config.json").read_text())
    config = peft.LoraConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules")
    if peft.__version__ == "0.21.2":
        assert theirs == ours
