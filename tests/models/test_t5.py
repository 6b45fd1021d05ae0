"""T5, its later versions and mT5 against transformers and PEFT."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import models
from jaxtune.checkpoint.adapter import load_adapter, save_adapter
from jaxtune.checkpoint.hf import load_weights
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.data.batch import PairBatch
from jaxtune.errors import ConfigError
from jaxtune.infer import Sampling, engine
from jaxtune.models.t5_layout import GATED
from jaxtune.nn.relative import Buckets
from jaxtune.objectives import OBJECTIVES
from jaxtune.schema import Objective, Peft
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import make_mesh
from tests import oracle, tolerances

# Family, fields of config.json besides TINY's, whether the head is the embedding.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "t5": ("t5", {}, True),
    "flan": ("t5", {**GATED, "num_layers": 3, "num_decoder_layers": 2}, False),
    "mt5": ("mt5", {}, False),
    "symmetric": ("t5", {"d_kv": 8, "num_decoder_layers": None}, True),
    "tied-unscaled": ("t5", {**GATED, "feed_forward_proj": "gated-silu"}, True),
}
SOURCE, TARGET = 23, 14
RATIO = {"tie_word_embeddings": True}


def cases(*quick: str) -> Any:
    """All cases; those not named are slow."""
    marks = {True: [], False: [pytest.mark.slow]}
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=marks[c in quick]) for c in CASES]
    )


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Case(NamedTuple):
    """A torch model, the same as a checkpoint, two rows of which one is shorter, as torch's too."""

    hf: Any
    checkpoint: Checkpoint
    batch: PairBatch
    arguments: dict[str, Any]


@functools.cache
def made(case: str) -> Case:
    import torch
    import transformers

    name, changes, tied = CASES[case]
    fields = {k: v for k, v in (models.family(name).TINY | changes).items() if v is not None}
    config = transformers.AutoConfig.for_model(**fields)
    maker = transformers.AutoModelForSeq2SeqLM
    hf = oracle.randomized(maker.from_config(config, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith(".q.weight"):  # there is no other 1 / sqrt(H)
                parameter.mul_(config.d_kv**-0.5)
    if not tied:
        # transformers 5 ties what it makes anew, and reads files whose head is another.
        other = oracle.randomized(torch.nn.Linear(config.d_model, config.vocab_size, bias=False), 1)
        hf.lm_head.weight = other.weight
        hf.config.tie_word_embeddings = False
    checkpoint = oracle.checkpoint_of(hf)
    checkpoint.config["architectures"] = [type(hf).__name__]
    files = {k: v for k, v in checkpoint.tensors.items() if not k.endswith("embed_tokens.weight")}
    checkpoint = dataclasses.replace(checkpoint, tensors=files)
    source, tokens = (3 + oracle.random_tokens(i, 2, n) for i, n in ((1, SOURCE), (2, TARGET)))
    of_source, of_target = np.ones_like(source), np.ones_like(tokens)
    of_source[1, 17:] = of_target[1, 9:] = 0
    batch = PairBatch(source, of_source, tokens, of_target, of_target.astype(np.float32))
    labels = np.where(of_target > 0, tokens, -100)
    given = {"input_ids": source, "attention_mask": of_source, "labels": labels}
    return Case(hf, checkpoint, batch, {k: torch.tensor(v).long() for k, v in given.items()})


def logits_of(model: Any, batch: PairBatch) -> jax.Array:
    memory = model.encoded(batch.source, batch.source_segments)
    read = np.roll(batch.tokens, 1, axis=1)
    read[:, 0] = model.config.start_token
    return model.logits(model.decoded(read, batch.segment_ids, memory, batch.source_segments))


def loss_of(model: Any, batch: PairBatch) -> jax.Array:
    total, sums = OBJECTIVES["seq2seq"](model, batch, loss_dtype=jnp.float32)
    return total / sums["weight"]


def computed(loaded: oracle.Loaded, batch: PairBatch, params: Any = None) -> Any:
    """((loss, logits), gradients) as one program."""

    @jax.jit
    def program(params: Any) -> Any:
        def both(params: Any) -> Any:
            model = loaded.skeleton.model(params)
            return loss_of(model, batch), logits_of(model, batch)

        return jax.value_and_grad(both, has_aux=True)(params)

    return program(loaded.params if params is None else params)


@cases("t5")
def test_loss_logits_gradients_and_files(case: str, tmp_path: Path):
    hf, checkpoint, batch, arguments = made(case)
    loaded = oracle.load(checkpoint)
    (loss, logits), gradients = computed(loaded, batch)
    hf.zero_grad()
    theirs = hf(**arguments)
    theirs.loss.backward()
    real = batch.segment_ids > 0
    expected = theirs.logits.detach().numpy()[real]
    assert np.abs(expected).max() > 0.5
    assert oracle.difference(np.asarray(logits)[real], expected) <= tolerances.LOGITS
    assert float(loss) == pytest.approx(theirs.loss.item(), rel=1e-5)
    named = {name: p.grad.numpy() for name, p in hf.named_parameters()}
    read = dataclasses.replace(checkpoint, read=lambda tensor: named[tensor])
    abstract = loaded.skeleton.abstract()
    expected = load_weights(read, loaded.weights, abstract, loaded.stacks)
    scale = max(np.abs(x).max() for x in named.values())
    for path in expected:
        assert np.abs(expected[path]).max() > 0, path
        assert np.abs(gradients[path] - expected[path]).max() <= tolerances.GRADIENTS * scale, path

    folder = tmp_path / "out"
    save_model(folder, loaded.params, checkpoint, loaded.weights, loaded.stacks)
    oracle.assert_same_files(folder, checkpoint)


@cases("flan")
def test_files_of_transformers(case: str, tmp_path: Path):
    hf, checkpoint, *_ = made(case)
    hf.save_pretrained(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    assert set(opened.tensors) >= set(checkpoint.tensors)
    ours, theirs = (models.read_config(c.config, "x")[1] for c in (opened, checkpoint))
    assert ours == theirs
    # As transformers 5 describes what it has read: tied, whatever the files hold.
    described = json.loads((tmp_path / "config.json").read_text()) | RATIO
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert models.read_config(open_checkpoint(str(tmp_path)).config, "x")[1] == theirs
    params = oracle.load(open_checkpoint(str(tmp_path))).params
    for path, array in oracle.load(checkpoint).params.items():
        np.testing.assert_array_equal(array, params[path], path)


@pytest.mark.parametrize("penalty", [None, pytest.param(1.7, marks=pytest.mark.slow)])
@cases("t5")
def test_cached_generation(case: str, penalty: float | None):
    import torch

    hf, checkpoint, batch, _ = made(case)
    loaded = oracle.load(checkpoint)
    sources = [batch.source[0].tolist(), batch.source[1, :7].tolist()]
    answers = engine.generate(
        loaded.skeleton,
        loaded.params,
        sources,
        max_new_tokens=32,
        eos_ids=(),
        sampling=Sampling(repetition_penalty=penalty),
    )
    hf.generation_config.eos_token_id = None
    for source, answer in zip(sources, answers, strict=True):
        # transformers' cache has as many layers as the encoder.
        options = {"max_new_tokens": 32, "do_sample": False, "use_cache": False}
        theirs = hf.generate(torch.tensor([source]), repetition_penalty=penalty, **options)
        assert theirs[0, 1:].tolist() == answer
        if penalty is None:
            ids, target = np.array([source], np.int32), np.array([answer], np.int32)
            ones = np.ones_like(ids), np.ones_like(target)
            row = PairBatch(ids, ones[0], target, ones[1], ones[1].astype(np.float32))
            full = logits_of(loaded.skeleton.model(loaded.params), row)
            assert full[0].argmax(-1).tolist() == answer


@cases()
def test_laws(case: str):
    _, checkpoint, batch, _ = made(case)
    loaded = oracle.load(checkpoint)
    (loss, _), gradients = computed(loaded, batch)

    def same(found: Any, tolerance: float, **policy: Any) -> None:
        (other, _), others = found
        assert float(other) == pytest.approx(float(loss), rel=tolerance), policy
        if not policy:
            scale = max(np.abs(x).max() for x in gradients.values())
            for path, one in gradients.items():
                off = np.abs(np.asarray(others[path]) - one).max()
                assert off <= tolerances.GRADIENTS * scale, path

    unrolled = oracle.load(checkpoint, layers="unroll")
    same(computed(unrolled, batch), tolerances.LOGITS, layers="unroll")
    for remat in ("attention", "dots", "full"):
        same(computed(oracle.load(checkpoint, remat=remat), batch), tolerances.LOGITS)
    wider = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 150))), batch)
    same(computed(loaded, wider), tolerances.LOGITS)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    sharded = oracle.load(checkpoint, mesh=mesh)
    placed = rules.placed(sharded.skeleton, mesh)
    params = {path: jax.device_put(x, placed[path].sharding) for path, x in sharded.params.items()}
    same(computed(sharded, batch, params), tolerances.SHARDED)


@pytest.mark.filterwarnings("ignore")  # PEFT asks transformers by an old name
@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("t5", ("all-linear",)),
        pytest.param("mt5", ("cross.q_proj", "v_proj"), marks=pytest.mark.slow),
        pytest.param("flan", (r".*\.encoder\.mlp\..*",), marks=pytest.mark.slow),
    ],
)
def test_lora_in_peft(case: str, targets: tuple[str, ...], tmp_path: Path):
    import peft
    import torch

    _, checkpoint, batch, arguments = made(case)
    loaded = oracle.load(checkpoint)
    adapted = oracle.adapt(loaded, Peft(target_modules=targets, rank=3, alpha=5.0))
    params = {**adapted.frozen, **adapted.trainable}
    ours = jax.jit(lambda params: logits_of(adapted.skeleton.model(params), batch))(params)
    base, where = loaded.skeleton.abstract(), (loaded.weights, loaded.stacks)
    folder = tmp_path / "adapter"
    save_adapter(
        folder, params, adapted.adapters, base, *where, base="random", task_type="SEQ_2_SEQ_LM"
    )
    made.cache_clear()  # PEFT changes the model that it is given
    theirs = peft.PeftModel.from_pretrained(made(case).hf, str(folder)).eval()
    assert type(theirs) is peft.PeftModelForSeq2SeqLM
    with torch.no_grad():
        expected = theirs(**arguments).logits.numpy()
    real = batch.segment_ids > 0
    assert oracle.difference(np.asarray(ours)[real], expected[real]) <= tolerances.LOGITS
    theirs.save_pretrained(str(tmp_path / "theirs"))
    made.cache_clear()
    if targets == ("all-linear",):  # as people write it
        config = tmp_path / "theirs" / "adapter_config.json"
        short = {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}
        config.write_text(json.dumps(json.loads(config.read_text()) | short))
    for saved in (folder, tmp_path / "theirs"):
        back = load_adapter(saved, base, *where, base=checkpoint)
        assert back.params
        for path, array in back.params.items():
            np.testing.assert_allclose(array, params[path], rtol=1e-6, err_msg=path)


def test_buckets_are_those_of_transformers():
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-5000, 5001)
    for count, furthest in ((32, 128), (8, 20), (64, 300)):
        for way in (True, False):
            expected = T5Attention._relative_position_bucket(
                torch.tensor(distances), way, count, furthest
            )
            found = Buckets(count=count, furthest=furthest, both_ways=way).of(distances)
            np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ("t5", "sft", "reads a source and writes a target - set objective.name=seq2seq"),
        ("llama", "seq2seq", "has no encoder that reads sources"),
        ("t5", "sequence_classification", "not supported for t5"),
    ],
)
def test_objectives_for_other_models_are_refused(model: str, objective: str, message: str):
    asked = Objective(name=objective, labels=("a",) if "class" in objective else ())
    with pytest.raises(ConfigError, match=message):
        with_head(open_checkpoint(f"tiny:{model}"), asked, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [("t5:small", 60.5), ("t5:base", 222.9), ("t5:large", 737.7), ("t5:3b", 2851.6)]
    + [("t5:v1_1-small", 77.0), ("t5:flan-base", 247.6), ("t5:flan-xl", 2849.8)]
    + [("mt5:small", 300.2), ("mt5:xl", 3742.6)],
)
def test_sizes_have_the_published_numbers_of_parameters(name: str, millions: float):
    from flax import nnx

    from jaxtune import tree
    from jaxtune.nn.params import Policy

    family = models.family(name.partition(":")[0])
    config = family.Config.from_hf(models.sized(*name.split(":")))
    skeleton = tree.describe(lambda: family.build(config, Policy(), nnx.Rngs(0)))
    assert tree.count(skeleton.abstract()) / 1e6 == pytest.approx(millions, abs=0.1)
