import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import tree
from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.safetensors import INDEX_FILE, read_folder, read_tensor, write_folder
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.errors import ConfigError, StorageError, WeightError
from jaxtune.sharding.mesh import make_mesh
from jaxtune.sharding.rules import sharding

LAYOUTS = ("scan", "unroll")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def changed(checkpoint: Checkpoint, arrays: dict[str, np.ndarray | None]) -> Checkpoint:
    """The checkpoint with some tensors replaced, added, or (None) removed."""
    tensors = dict(checkpoint.tensors)
    for name, array in arrays.items():
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = TensorInfo(array.shape, array.dtype)

    def read(name: str) -> np.ndarray:
        array = arrays.get(name)
        return checkpoint.read(name) if array is None else array

    return replace(checkpoint, tensors=tensors, read=read)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: read_tensor(location) for name, location in read_folder(folder).items()}


@pytest.mark.parametrize("layers", LAYOUTS)
def test_every_tensor_lands_in_its_place(layers: str, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, layers)
    done = []
    params = load_weights(
        tiny, model.weights, model.abstract, model.stacks, progress=lambda *n: done.append(n)
    )
    assert set(params) == set(model.abstract)
    assert done[-1] == (len(tiny.tensors), len(tiny.tensors)) == (len(done), len(done))
    for path, leaf in model.abstract.items():
        assert (params[path].shape, params[path].dtype) == (leaf.shape, leaf.dtype)
    down = tiny.read("model.layers.2.mlp.down_proj.weight").T
    path, index = ("layers.0", 2) if layers == "scan" else ("layers.2", 0)
    np.testing.assert_array_equal(params[f"{path}.mlp.down_proj.kernel"][index], down)
    np.testing.assert_array_equal(params["lm_head.kernel"], tiny.read("lm_head.weight").T)


@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bitwise(tmp_path: Path, layers: str, dtype: str, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, layers)
    params = load_weights(tiny, model.weights, model.abstract, model.stacks)
    first, second = tmp_path / "first", tmp_path / "second"
    save_model(first, params, tiny, model.weights, model.stacks, dtype=dtype)
    source = open_checkpoint(str(first))
    assert source.config["dtype"] == dtype
    assert {info.dtype.name for info in source.tensors.values()} == {dtype}
    params = load_weights(source, model.weights, model.abstract, model.stacks)
    save_model(second, params, source, model.weights, model.stacks)
    before, after = tensors_of(first), tensors_of(second)
    assert set(before) == set(after) == set(tiny.tensors)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name].view(np.uint8), array.view(np.uint8))


@pytest.mark.parametrize("layers", LAYOUTS)
def test_sharded_arrays(layers: str, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, layers)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            ml_dtypes.bfloat16,
            sharding=sharding(leaf.shape, model.skeleton.axes(path), mesh),
        )
        for path, leaf in model.abstract.items()
    }
    params = load_weights(tiny, model.weights, abstract, model.stacks)
    whole = load_weights(tiny, model.weights, model.abstract, model.stacks)
    sharded = 0
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(abstract[path].sharding, array.ndim), path
        np.testing.assert_array_equal(array, np.asarray(whole[path]).astype(ml_dtypes.bfloat16))
        sharded += not array.sharding.is_fully_replicated
    assert sharded >= 7


def test_layer_axis_may_be_sharded(describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, "scan")
    mesh = make_mesh({"stage": 3}, jax.devices()[:3])
    stage = NamedSharding(mesh, PartitionSpec("stage"))
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=stage if path.startswith("layers") else whole
        )
        for path, leaf in model.abstract.items()
    }
    params = load_weights(tiny, model.weights, abstract, model.stacks)
    plain = load_weights(tiny, model.weights, model.abstract, model.stacks)
    for path, array in params.items():
        np.testing.assert_array_equal(array, plain[path])


def test_all_misfits_are_listed_in_one_error(describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, "unroll")
    broken = changed(
        tiny,
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.weight": np.zeros((32, 31), np.float32),
            "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32),
            "model.layers.3.mlp.up_proj.weight": np.zeros((64, 32), np.float32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        },
    )
    with pytest.raises(WeightError) as caught:
        load_weights(broken, model.weights, model.abstract, model.stacks)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert lines == {
        "missing: model.norm.weight",
        "missing: model.layers.1.mlp.up_proj.weight",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is [32, 31], "
        "config.json asks for [32, 32]",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "unexpected: model.layers.3.mlp.up_proj.weight",
    }


@pytest.mark.parametrize("layers", LAYOUTS)
def test_nan_and_infinity_are_listed(layers: str, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, layers)
    broken = {}
    for name, value in (
        ("model.norm.weight", np.nan),
        ("model.layers.1.mlp.up_proj.weight", np.inf),
    ):
        broken[name] = tiny.read(name).copy()
        broken[name].flat[3] = value
    checkpoint = changed(tiny, broken)
    with pytest.raises(WeightError) as caught:
        load_weights(checkpoint, model.weights, model.abstract, model.stacks)
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == set(broken)
    params = load_weights(checkpoint, model.weights, model.abstract, model.stacks, allow_nan=True)
    assert np.isnan(params["norm.scale"][3])


def test_tied_head(tmp_path: Path, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    tied = replace(tiny, config=tiny.config | {"tie_word_embeddings": True})
    model = describe(tied, "scan")
    assert "lm_head.kernel" not in model.abstract
    params = load_weights(tied, model.weights, model.abstract, model.stacks)  # ignores the copy
    save_model(tmp_path / "out", params, tied, model.weights, model.stacks)
    assert set(tensors_of(tmp_path / "out")) == set(tiny.tensors) - {"lm_head.weight"}


def test_the_copy_of_a_head_that_the_family_ties_by_default(tmp_path: Path, describe: Callable):
    """As tiiuae/falcon-7b has it: config.json does not say that the head is tied."""
    tiny = open_checkpoint("tiny:falcon")
    config = {name: x for name, x in tiny.config.items() if name != "tie_word_embeddings"}
    table = tiny.read("transformer.word_embeddings.weight")
    model = describe(tiny, "scan")
    copied = changed(replace(tiny, config=config), {"lm_head.weight": table})
    params = load_weights(copied, model.weights, model.abstract, model.stacks)
    save_model(tmp_path / "out", params, copied, model.weights, model.stacks)
    assert set(tensors_of(tmp_path / "out")) == set(tiny.tensors)
    untied = replace(copied, config=config | {"tie_word_embeddings": False})
    params.pop("norm.scale")
    save_model(tmp_path / "out", params, untied, model.weights, model.stacks)
    assert set(tensors_of(tmp_path / "out")) == {*tiny.tensors, "lm_head.weight"}


def test_float64_source(describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, "scan")
    names = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    wide = changed(tiny, {name: tiny.read(name).astype(np.float64) for name in names})
    params = load_weights(wide, model.weights, model.abstract, model.stacks)
    assert params["norm.scale"].dtype == np.float32
    up = params["layers.0.mlp.up_proj.kernel"][1]
    np.testing.assert_array_equal(up, tiny.read(names[1]).T)


def exported(tmp_path: Path, describe: Callable, **options: object) -> Path:
    tiny = open_checkpoint("tiny:llama")
    model = describe(tiny, "scan")
    params = load_weights(tiny, model.weights, model.abstract, model.stacks)
    save_model(tmp_path / "out", params, tiny, model.weights, model.stacks, **options)
    return tmp_path / "out"


def test_shards_and_files(tmp_path: Path, describe: Callable):
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    options = {"max_shard_bytes": 40_000, "tokenizer": Tokenizer()}
    folder = exported(tmp_path, describe, **options)
    assert {path.name for path in folder.iterdir()} >= {INDEX_FILE, "tokenizer.json", "config.json"}
    record = json.loads((folder / "jaxtune_export.json").read_text())
    assert record == {"kind": "model", "base": "tiny:llama"}
    tiny = open_checkpoint("tiny:llama")
    for name, array in tensors_of(folder).items():
        np.testing.assert_array_equal(array, tiny.read(name))


def test_export_replaces_only_exports(tmp_path: Path, describe: Callable):
    folder = exported(tmp_path, describe)
    (folder / "left over").write_text("from the first export")
    assert not (exported(tmp_path, describe) / "left over").exists()
    (folder / "jaxtune_export.json").unlink()
    with pytest.raises(ConfigError, match="did not export"):
        exported(tmp_path, describe)
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_into_its_source_is_refused(tmp_path: Path, describe: Callable):
    source = open_checkpoint(str(exported(tmp_path, describe)))
    model = describe(source, "scan")
    params = load_weights(source, model.weights, model.abstract, model.stacks)
    for folder in (source.root, source.root / "inside"):
        with pytest.raises(ConfigError, match="inside the model"):
            save_model(folder, params, source, model.weights, model.stacks)


def test_failed_export_leaves_the_old_one(
    tmp_path: Path, describe: Callable, monkeypatch: pytest.MonkeyPatch
):
    folder = exported(tmp_path, describe)
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setenv("JAXTUNE_TEST", "1")
    monkeypatch.setenv("JAXTUNE_FAULT", "export_shard=enospc")
    with pytest.raises(StorageError, match="cannot write"):
        exported(tmp_path, describe)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overflow_is_refused(tmp_path: Path, describe: Callable):
    tiny = open_checkpoint("tiny:llama")
    big = changed(tiny, {"model.norm.weight": np.full(32, 1e6, np.float32)})
    model = describe(big, "scan")
    params = load_weights(big, model.weights, model.abstract, model.stacks)
    with pytest.raises(WeightError, match="model.norm.weight holds values too large for float16"):
        save_model(tmp_path / "out", params, big, model.weights, model.stacks, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("point", ["export_shard", "export_index"])
def test_killed_export_shows_nothing_and_can_be_repeated(tmp_path: Path, point: str):
    program = """
        from pathlib import Path; import sys
        from jaxtune.checkpoint.safetensors import write_folder
        from jaxtune.checkpoint.folder import replace_folder
        from jaxtune.checkpoint.tensors import TensorInfo
        import numpy as np
        info = {n: TensorInfo((4,), np.dtype("float32")) for n in "abc"}
        with replace_folder(Path(sys.argv[1]), {}) as folder:
            write_folder(folder, info, lambda n: np.ones(4, np.float32), max_shard_bytes=16)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out")]
    environment = os.environ | {"JAXTUNE_TEST": "1", "JAXTUNE_FAULT": f"{point}=kill"}
    assert subprocess.run(command, env=environment, timeout=60).returncode == -9
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, timeout=60).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(read_folder(tmp_path / "out")) == 3


MEMORY_PROGRAM = """
    import resource, sys
    import jax, numpy as np
    from jaxtune import hardware, models, tree
    from jaxtune.checkpoint.hf import load_weights
    from jaxtune.checkpoint.source import open_checkpoint
    from jaxtune.nn.params import Policy
    from flax import nnx
    hardware.prepare("")
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    checkpoint = open_checkpoint(sys.argv[1])
    family = models.family("llama")
    config = family.Config.from_hf(checkpoint.config)
    policy = Policy(layers=sys.argv[2], param_dtype=sys.argv[3])
    skeleton = tree.describe(lambda: family.build(config, policy, nnx.Rngs(0)))
    n = config.num_layers
    stacks = (n,) if policy.layers == "scan" else (1,) * n
    before = peak()
    params = load_weights(checkpoint, family.weights(config), skeleton.abstract(), stacks)
    print(peak() - before, sum(a.nbytes for a in params.values()) / 1e9)
"""


@pytest.mark.slow
def test_peak_host_memory(tmp_path: Path):
    """A 1.07 GB bfloat16 folder; the largest tensor has 65 MB."""
    config = open_checkpoint("tiny:llama").config | {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 29,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": (32000, 1024), "model.norm.weight": (1024,)}
    shapes = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024)}
    shapes |= {"mlp.down_proj": (1024, 4096)}
    shapes |= {"input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    for layer in range(29):
        tensors |= {f"model.layers.{layer}.{name}.weight": s for name, s in shapes.items()}
    infos = {name: TensorInfo(shape, BFLOAT16) for name, shape in tensors.items()}
    write_folder(tmp_path, infos, lambda name: np.ones(infos[name].shape, BFLOAT16))
    size = sum(info.nbytes for info in infos.values()) / 1e9
    assert 1.0 < size < 1.1
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    for layers in LAYOUTS:
        command = [sys.executable, "-c", textwrap.dedent(MEMORY_PROGRAM)]
        command += [str(tmp_path), layers, "bfloat16"]
        output = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=300
        ).stdout
        above, final = map(float, output.split())
        assert final == pytest.approx(size)
        assert above < size + 2 * 0.066 + 0.1, (layers, above)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_transformers_model_round_trip(
    tmp_path: Path, layers: str, options: dict, describe: Callable
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            **options,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(str(tmp_path / "theirs"))
    model = describe(source, layers)
    params = load_weights(source, model.weights, model.abstract, model.stacks)
    save_model(tmp_path / "ours", params, source, model.weights, model.stacks)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = np.random.default_rng(0).integers(0, 97, (2, 11))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits
        assert torch.equal(back(torch.tensor(ids)).logits, expected)
    ours = model.skeleton.model(params)
    positions = np.broadcast_to(np.arange(11), ids.shape)
    hidden, _ = ours.hidden(ids, positions, None)
    difference = np.abs(np.asarray(ours.logits(hidden)) - expected.numpy()).max()
    assert difference <= 1e-4 * float(expected.abs().max())
    assert tree.count(params) == sum(array.size for array in before.values())
