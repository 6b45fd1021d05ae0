"""LoRAs that start as a part of the base: PiSSA and LoftQ against PEFT."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import build, config, data, quant
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import ConfigError
from jaxtune.export import export
from jaxtune.exports import write_adapter, write_merged
from jaxtune.peft.split import Start, loftq, randomized_svd
from jaxtune.quant import QArray
from jaxtune.schema import Data, Model, Objective, Optim, Peft, Quant, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.train import train
from tests import oracle
from tests.test_train import run_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
SOME = ("q_proj", "down_proj")
RANKS = ("layers.0.attn.q_proj=5", "down_proj=2")


@functools.cache
def model() -> Any:
    return oracle.hf_llama(**SIZES)


@functools.cache
def dense() -> Checkpoint:
    return oracle.checkpoint_of(model())


def described(
    checkpoint: Checkpoint, *, quantized: tuple[str, ...] = (), layers: str = "scan", **peft: Any
) -> build.Run:
    options = {"rank": 3, "alpha": 5.0, "target_modules": SOME} | peft
    run_config = RunConfig(
        model=Model(layers=layers),
        quant=Quant(format=quantized),
        peft=Peft(**options),
        data=Data(train=("rows.jsonl",)),
    )
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return build.describe(run_config, mesh, checkpoint)


def begun(run: build.Run, taken: Any = None) -> dict[str, Any]:
    values = build.fill_base(run, lambda done, total: None, taken)
    return values | build.fill_adapter(run, values)


def learnt(run: build.Run, values: dict[str, Any]) -> dict[str, Any]:
    """The same after some training: noise where an adapter's layer has a rank."""
    random, changed = np.random.default_rng(7), dict(values)
    for name in run.trainable:
        array = np.asarray(values[name])
        noise = random.normal(0, 0.1, array.shape).astype(np.float32)
        changed[name] = jnp.asarray(array + np.where(array != 0, noise, 0))
    return changed


def weight(run: build.Run, values: dict[str, Any], path: str, index: int) -> np.ndarray:
    """What a layer multiplies with, [D_out, D_in]."""
    kernel = jax.tree.map(lambda leaf: leaf[index], values[f"{path}.kernel"])
    kernel = quant.dequantize(kernel, jnp.float32) if isinstance(kernel, QArray) else kernel
    slot = f"{path}.adapter"
    a, b, scale = (np.asarray(values[f"{slot}.{leaf}"][index]) for leaf in ("a", "b", "scale"))
    return (np.asarray(kernel) + scale * (a @ b)).T


@pytest.mark.parametrize(
    "options", [{"rank_pattern": RANKS}, pytest.param({"rslora": True}, marks=pytest.mark.slow)]
)
def test_pissa_is_pefts_and_becomes_a_plain_lora(options: dict, tmp_path: Path):
    import peft

    run = described(dense(), init="pissa", **options)
    values = begun(run)
    patterns = {"layers.0.self_attn.q_proj": 5, "down_proj": 2} if "rslora" not in options else {}
    theirs = peft.get_peft_model(
        copy.deepcopy(model()),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(SOME), init_lora_weights="pissa",
                        use_rslora=options.get("rslora", False), rank_pattern=patterns),
    )  # fmt: skip
    layers = dict(theirs.named_modules())
    for path, name in (("attn.q_proj", "self_attn.q_proj"), ("mlp.down_proj", "mlp.down_proj")):
        for index in range(2):
            layer = layers[f"base_model.model.model.layers.{index}.{name}"]
            kept = np.asarray(values[f"layers.0.{path}.kernel"][index]).T
            theirs_kept = layer.base_layer.weight.detach().numpy()
            # Neighbouring singular values of a random matrix are close, so what is cut off varies.
            assert oracle.difference(kept, theirs_kept) <= 1e-4
            original = dense().read(f"model.layers.{index}.{name}.weight")
            assert oracle.difference(kept, original) > 0.1
            both = weight(run, values, f"layers.0.{path}", index)
            assert oracle.difference(both, original) <= 1e-5
            a = layer.lora_A["default"].weight.detach().numpy()
            ours = np.asarray(values[f"layers.0.{path}.adapter.a"][index]).T[: len(a)]
            assert oracle.difference(np.abs(ours), np.abs(a)) <= 1e-3  # signs are free

    changed = learnt(run, values)
    write_adapter(run, changed, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model()), tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["init_lora_weights"]) == (6, True)
    merged = loaded.merge_and_unload().state_dict()
    for index in range(2):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        wanted = weight(run, changed, "layers.0.mlp.down_proj", index)
        assert oracle.difference(wanted, dense().read(name)) > 0.02
        assert oracle.difference(merged[name].numpy(), wanted) <= 1e-5


@pytest.mark.parametrize(
    ("format", "layers", "options"),
    [
        ("int8=.*mlp.*", "scan", {"init": "pissa", "pissa_iterations": 1}),
        pytest.param("nf4", "unroll", {"init": "pissa"}, marks=pytest.mark.slow),
        pytest.param(
            "nf4", "scan", {"init": "loftq", "loftq_iterations": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_base_is_the_same_to_the_bit(format: str, layers: str, options: dict):
    run = described(dense(), quantized=(format,), layers=layers, **options)
    first = begun(run)
    again = begun(run, {name: first[name] for name in run.taken})
    for name in run.frozen:
        jax.tree.map(np.testing.assert_array_equal, first[name], again[name])


def test_a_randomized_svd_finds_the_largest_triplets():
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(n, 20)))[0] for n in (40, 30))
    matrix = (u * 0.6 ** np.arange(20)) @ v.T
    u3, s3, vt3 = randomized_svd(jnp.asarray(matrix, jnp.float32), 3, 8, random)
    assert oracle.difference(s3, 0.6 ** np.arange(3)) <= 1e-5
    exact = (u[:, :3] * 0.6 ** np.arange(3)) @ v[:, :3].T
    assert oracle.difference((u3 * s3) @ vt3, exact) <= 1e-4
    run = described(dense(), init="pissa", pissa_iterations=4)
    values = begun(run)
    original = dense().read("model.layers.1.self_attn.q_proj.weight")
    assert oracle.difference(weight(run, values, "layers.0.attn.q_proj", 1), original) <= 1e-5


def test_the_residual_is_what_is_quantized(tmp_path: Path):
    run = described(
        dense(), quantized=("nf4=.*down.*",), init="pissa", rank=8, target_modules=("down_proj",)
    )
    values = begun(run)
    path, name = "layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"
    original = dense().read(name)
    a, b = (np.asarray(values[f"{path}.taken.{leaf}"][1]) for leaf in "ab")
    residual = original.T - 5 / 8 * (a @ b)
    wanted = quant.quantize(jnp.asarray(residual), "nf4", double_quant=True)
    found = jax.tree.map(lambda leaf: leaf[1], values[f"{path}.kernel"])
    assert (np.asarray(found.codes) != np.asarray(wanted.codes)).mean() < 1e-3  # ties
    plain = quant.dequantize(quant.quantize(jnp.asarray(original.T), "nf4"), jnp.float32)
    lost = np.linalg.norm(np.asarray(plain).T - original)
    assert np.linalg.norm(weight(run, values, path, 1) - original) < 0.95 * lost
    changed, tokenizer = learnt(run, values), data.load_tokenizer("tiny:llama")
    write_merged(run, changed, tokenizer, tmp_path / "decoded")
    merged = open_checkpoint(str(tmp_path / "decoded")).read(name)
    assert oracle.difference(merged, weight(run, changed, path, 1)) <= 1e-6
    files = dataclasses.replace(run.config.checkpoint, merge_base="original")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, checkpoint=files))
    write_merged(run, changed, tokenizer, tmp_path / "original")
    merged = open_checkpoint(str(tmp_path / "original")).read(name)
    pair = changed[f"{path}.adapter.a"][1] @ changed[f"{path}.adapter.b"][1]
    assert oracle.difference(merged.T, original.T + 5 / 8 * (pair - a @ b)) <= 1e-5


def transcribed_loftq(
    matrix: np.ndarray, rank: int, iterations: int, rounded: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PEFT's loftq_init for a weight (out, in), in NumPy; `rounded` stands for bitsandbytes."""
    rest = matrix.copy()
    for step in range(iterations):
        base = rounded(rest)
        u, s, vh = np.linalg.svd(matrix - base, full_matrices=False)
        left = u @ np.sqrt(np.diag(s)[:, :rank])
        right = np.sqrt(np.diag(s)[:rank, :]) @ vh
        if step + 1 < iterations:
            rest = matrix - left @ right
    return base, right, left


@pytest.mark.parametrize("iterations", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "format", ["nf4", *(pytest.param(f, marks=pytest.mark.slow) for f in ("fp4", "int4", "int8"))]
)
def test_loftq_is_pefts(format: str, iterations: int):
    options = {"target_modules": ("down_proj",), "loftq_iterations": iterations}
    formats = (f"{format}=.*down.*",)
    run = described(dense(), quantized=formats, init="loftq", rank=4, alpha=4.0, **options)
    values = begun(run)
    original = dense().read("model.layers.1.mlp.down_proj.weight")

    def rounded(rest: np.ndarray) -> np.ndarray:
        nests = quant.FORMATS[format].nests
        coded = quant.quantize(jnp.asarray(rest.T), format, double_quant=nests)
        return np.asarray(quant.dequantize(coded, jnp.float32)).T

    base, right, left = transcribed_loftq(original, 4, iterations, rounded)
    path = "layers.0.mlp.down_proj"
    kernel = jax.tree.map(lambda leaf: leaf[1], values[f"{path}.kernel"])
    found = np.asarray(quant.dequantize(kernel, jnp.float32)).T
    differing = np.abs(found - base) > 1e-6
    assert differing.mean() < 2e-3  # numbers halfway between two codes
    error = np.linalg.norm(weight(run, values, path, 1) - original)
    assert error <= 1.001 * np.linalg.norm(base + left @ right - original)
    assert error < 0.95 * np.linalg.norm(rounded(original) - original)
    if not differing.any():
        pair = np.asarray(values[f"{path}.adapter.a"][1] @ values[f"{path}.adapter.b"][1]).T
        assert oracle.difference(pair, left @ right) <= 1e-3


@pytest.mark.slow
def test_the_scale_of_loftq_is_divided_out():
    run = described(dense(), quantized=("nf4",), init="loftq", rank=4, alpha=4.0)
    scaled = described(dense(), quantized=("nf4",), init="loftq", rank=4, alpha=32.0)
    path = "layers.0.attn.q_proj"
    one, other = (weight(r, begun(r), path, 0) for r in (run, scaled))
    assert oracle.difference(one, other) <= 1e-5
    adapters = run.adapters
    assert adapters is not None
    identity = loftq(jnp.eye(4), adapters.config, Start(init="loftq"), lambda kernel: kernel)
    assert not np.asarray(identity.a).any() and identity.taken is None


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_run_resumes_and_exports(init: str, tmp_path: Path):
    """Two steps and two more are four; the exports say what was trained."""
    peft = {"init": init, "rank": 4, "target_modules": ("o_proj",)}
    if init == "loftq":
        peft["loftq_iterations"] = 2
    sections: dict[str, Any] = {"peft": peft, "checkpoint": {"every_steps": 2}}
    if init == "loftq":
        sections["quant"] = {"format": ("int8",)}

    def cfg(name: str, steps: int) -> RunConfig:
        cfg = run_config(tmp_path, name, **sections)
        optim = Optim(learning_rate=1e-2, schedule="constant")
        return dataclasses.replace(
            cfg, train=dataclasses.replace(cfg.train, num_steps=steps), optim=optim
        )

    whole = train(cfg("whole", 4))
    train(cfg("parts", 2))
    parts = train(cfg("parts", 4))
    files = [r.paths["adapter"] / "adapter_model.safetensors" for r in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = export(tmp_path / "parts", tmp_path / "again", to="adapter")
    assert (again["adapter"] / files[0].name).read_bytes() == files[0].read_bytes()
    fields = config.from_json((tmp_path / "parts" / "config.json").read_text()).peft
    assert fields.init == init
    assert ("base" in whole.paths) == (init == "loftq")
    if init == "loftq":
        base = export(tmp_path / "parts", tmp_path / "base", to="base")["base"]
        name = "model.layers.0.self_attn.o_proj.weight"
        later, at_end = (open_checkpoint(str(p)).read(name) for p in (base, parts.paths["base"]))
        np.testing.assert_array_equal(later, at_end)
        original = open_checkpoint("tiny:llama").read(name)
        assert 0 < oracle.difference(later, original) < 0.2
    else:
        with pytest.raises(ConfigError, match="as it is"):
            export(tmp_path / "parts", tmp_path / "base", to="base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pissa", "rank": 65}, "q_proj has only 64 singular values"),
        ({"init": "loftq", "quantized": ("nf4=.*mlp.*",)}, "attn.q_proj is not quantized"),
        ({"init": "pissa", "target_modules": ("embed", "q_proj")}, "leave embed out"),
        ({"init": "pissa", "method": "dora"}, "init='pissa' would be ignored: peft.method=dora"),
        ({"init": "pissa", "adapter": "folder"}, "init='pissa' would be ignored: peft.adapter"),
    ],
)
def test_starts_that_cannot_be(options: dict, message: str):
    if "adapter" in options:
        options = options | {"rank": 16, "alpha": 32.0, "target_modules": ("all-linear",)}
    with pytest.raises(ConfigError, match=message):
        described(dense(), **options)


def test_loftq_of_a_layer_that_is_never_quantized():
    run_config = RunConfig(
        objective=Objective(name="sequence_classification", labels=("a", "b")),
        quant=Quant(format=("int8",)),
        peft=Peft(init="loftq", rank=2, target_modules=("pooler",)),
        data=Data(train=("rows.jsonl",)),
    )
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="pooler is not quantized - leave it out"):
        build.describe(run_config, mesh, open_checkpoint("tiny:bert"))
