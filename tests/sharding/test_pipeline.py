"""The schedule of a pipeline on toy layers, what it refuses, and what else runs on stages."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxtune import build
from jaxtune.errors import ConfigError
from jaxtune.infer import Sampling, generate
from jaxtune.schema import Data, Mesh, Model, Peft, RunConfig, Train
from jaxtune.sharding import pipeline
from jaxtune.sharding.mesh import make_mesh
from jaxtune.train import train
from tests import oracle, test_train, tolerances

WIDTH, ROWS, LENGTH = 8, 8, 4


def toy_layer(x: jax.Array, weight: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = x + jnp.tanh(x @ weight) * rows[:, None, None]
    return y, y.sum(axis=(1, 2))


def toy_layers(chunks: Any, turn: jax.Array, x: jax.Array, rows: jax.Array) -> tuple:
    weights = jax.lax.select_n(turn, *chunks) if len(chunks) > 1 else chunks[0]
    return jax.lax.scan(lambda x, weight: toy_layer(x, weight, rows), x, weights)


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "num_chunks"),
    [
        ({"stage": 2, "fsdp": 2, "tensor": 2}, 4, 2),
        ({"stage": 2}, 1, 4),
        pytest.param({"stage": 4}, 8, 1, marks=pytest.mark.slow),
        pytest.param({"stage": 2, "data": 4}, 2, 4, marks=pytest.mark.slow),
        pytest.param({"stage": 4, "data": 2}, 4, 2, marks=pytest.mark.slow),
        pytest.param({"stage": 8}, 8, 1, marks=pytest.mark.slow),
        pytest.param({"stage": 4}, 1, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_pipeline_is_its_layers_in_turn(
    mesh: dict[str, int], micro_batches: int, num_chunks: int
):
    sizes = {"stage": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh
    devices = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.3, (8, WIDTH, WIDTH)).astype(np.float32)
    x = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    factors = random.normal(size=ROWS).astype(np.float32)

    def loss(weights: jax.Array, x: jax.Array, staged: bool) -> tuple[jax.Array, Any]:
        if not staged:
            y, new = jax.lax.scan(lambda x, w: toy_layer(x, w, factors), x, weights)
        else:
            chunks = jnp.split(weights, num_chunks)
            options: Any = {"mesh": devices, "micro_batches": micro_batches}
            y, parts = pipeline.run(toy_layers, chunks, x, factors, **options)
            new = jnp.concatenate(parts)
        return (y**2).sum(), (y, new)

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (y, new)), gradients = jax.jit(both, static_argnums=2)(weights, x, True)
    (_, (wanted, entries)), wanted_gradients = both(weights, x, False)
    assert oracle.difference(y, wanted) <= tolerances.OPS
    for got, right in zip(gradients, wanted_gradients, strict=True):
        assert oracle.difference(got, right) <= tolerances.OPS
    if micro_batches == 1:  # as with a cache
        assert oracle.difference(new, entries) <= tolerances.OPS


def test_every_micro_batch_draws_its_own_noise():
    mesh = make_mesh({"stage": 2}, jax.devices()[:2])
    keys = jax.random.split(jax.random.key(0), 4)

    def layers(chunks: Any, turn: jax.Array, x: jax.Array, rows: Any) -> tuple:
        def layer(x: jax.Array, key: jax.Array) -> tuple:
            return x + jax.random.uniform(key, x.shape), None

        return jax.lax.scan(layer, x, chunks[0])

    zeros = jnp.zeros((ROWS, LENGTH, WIDTH))
    run = jax.jit(lambda x: pipeline.run(layers, [keys], x, (), mesh=mesh, micro_batches=4)[0])
    parts = np.asarray(run(zeros)).reshape(4, -1)
    assert len({part.tobytes() for part in parts}) == 4
    assert 1 < parts.mean() < 3


def described(
    mesh: dict[str, int], *, layers: int = 4, model: Any = None, data: Any = None, **sections: Any
) -> build.Run:
    config = RunConfig(
        model=Model(**{"layers": "scan", "remat": "full"} | (model or {})),
        data=Data(**{"train": ("rows.jsonl",)} | (data or {})),
        peft=Peft(**sections.pop("peft", {"rank": 4})),
        train=Train(**{"micro_batch_size": 8} | sections.pop("train", {})),
        mesh=Mesh(**{"fsdp": 1} | mesh),
    )
    axes = config.mesh.axes()
    devices = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    hf = oracle.hf_llama(num_hidden_layers=layers)
    return build.describe(config, devices, oracle.checkpoint_of(hf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"mesh.stage=2 x train.pipeline_chunks=1 does not divide .* 3 layers"),
        ({"train": {"pipeline_chunks": 4}}, r"pipeline_chunks=4 does not divide .* 4 layers"),
        ({"train": {"micro_batch_size": 3}}, r"micro_batch_size=3 rows .* multiple of 2"),
        ({"train": {"pipeline_micro_batches": 3}}, r"=3 is not a multiple of mesh.stage=2"),
        ({"train": {"pipeline_micro_batches": 16}}, r"micro_batch_size=8 .* multiple of 16"),
        ({"data": {"eval_fraction": 0.1}, "train": {"pipeline_micro_batches": 16,
          "micro_batch_size": 16}}, r"eval.batch_size=8 rows .* multiple of 16"),
        ({"model": {"remat": "offload"}}, r"model.remat=offload .* choose dots or full"),
        ({"model": {"layers": "unroll"}}, r"model.layers=unroll has no stack"),
        ({"model": {"remat": "none"}, "train": {"pipeline_chunks": 2}}, r"remat=none would keep"),
        ({"peft": {"layers_to_transform": (0, 1)}, "train": {"pipeline_chunks": 2}},
         r"pipeline_chunks=2: layers.attn.k_proj.adapter.a is not alike in all chunks"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_before_weights_load(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        described({"stage": 2}, **options)


def test_micro_batches_need_stages():
    with pytest.raises(ConfigError, match="pipeline_micro_batches=2 needs a pipeline"):
        described({}, train={"pipeline_micro_batches": 2})


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stages_generate_like_one_device(chunks: int):
    """Each stage holds the keys and values of its own layers only."""
    prompts, options = [[5, 6, 7], [8, 9], [10] * 20], {"max_new_tokens": 6, "eos_ids": ()}
    answers = []
    for mesh, cut in (({}, {}), ({"stage": 2, "fsdp": 2}, {"pipeline_chunks": chunks})):
        run = described(mesh, train=cut, peft={"method": "full"})
        values = build.fill_base(run, lambda done, total: None)
        found = generate(run.skeleton, values, prompts, sampling=Sampling(), **options)
        answers.append(found)
    assert answers[0] == answers[1] and len(answers[0][0]) == 6
    kernel = values["layers.0.mlp.up_proj.kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_what_a_stack_keeps_lies_on_its_stage():
    run = described({"stage": 4, "fsdp": 2})
    for name, leaf in (run.frozen | run.trainable).items():
        if name.startswith("layers."):
            assert leaf.sharding.shard_shape(leaf.shape)[0] * 4 == leaf.shape[0], name
        else:
            assert "stage" not in str(leaf.sharding.spec), name
    batch = run.put(np.zeros((4, 16, 8), np.int32))
    wanted = NamedSharding(run.mesh, PartitionSpec(None, "fsdp"))
    assert batch.sharding.is_equivalent_to(wanted, 3)


def test_one_stage_has_no_pipeline_in_its_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "run", None)
    run = described({"fsdp": 2})
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def hidden(params: Any, tokens: jax.Array) -> jax.Array:
        return run.skeleton.model(params).hidden(tokens, tokens, None)[0]

    assert jax.eval_shape(hidden, run.skeleton.abstract(), tokens).shape == (2, 8, 32)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_on_stages_goes_on_and_is_exported_elsewhere(tmp_path: Path, chunks: int):
    """Steps 3 and 4 on stages, and again from the checkpoint of step 2 on a mesh without."""
    hf = oracle.hf_llama(num_hidden_layers=4, vocab_size=259, max_position_embeddings=512)
    hf.save_pretrained(tmp_path / "base")
    base = test_train.run_config(
        tmp_path,
        "run",
        model={"path": str(tmp_path / "base"), "tokenizer": "tiny:llama", "layers": "scan"},
        train={"micro_batch_size": 4, "pipeline_chunks": chunks},
        eval={"batch_size": 4, "exact_match": True, "max_rows": 2, "max_new_tokens": 4},
        checkpoint={"every_steps": 2, "export_merged": True},
        mesh={"stage": 2, "fsdp": 2, "tensor": 2},
    )
    first = train(base)
    exported = load_file(first.paths["adapter"] / "adapter_model.safetensors")
    merged = load_file(first.paths["merged"] / "model.safetensors")
    other = dataclasses.replace(
        base,
        mesh=Mesh(fsdp=8),
        train=dataclasses.replace(base.train, micro_batch_size=1),
        eval=dataclasses.replace(base.eval, batch_size=1),
        checkpoint=dataclasses.replace(base.checkpoint, resume="2"),
    )
    second = train(other)
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-5)
    assert second.metrics["eval_loss"] == pytest.approx(first.metrics["eval_loss"], rel=1e-5)
    again = load_file(second.paths["adapter"] / "adapter_model.safetensors")
    assert exported.keys() == again.keys() and len(again) == 2 * 7 * 4
    for name, array in exported.items():
        assert oracle.difference(again[name], array) <= 1e-4, name  # after Adam
    found = load_file(second.paths["merged"] / "model.safetensors")
    for name, array in merged.items():
        assert oracle.difference(found[name], array) <= 1e-4, name
