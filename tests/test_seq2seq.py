"""Whole runs of encoder-decoders, and what such runs refuse."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtune import build, config, generate, load
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.schema import (
    Checkpoint,
    Data,
    Eval,
    Log,
    Mesh,
    Model,
    Objective,
    Optim,
    Peft,
    RunConfig,
    Train,
)
from jaxtune.sharding.mesh import make_mesh
from jaxtune.train import train

ANSWERS = {"one": "uno", "two": "dos", "ten": "diez"}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Compiling takes nearly all of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_config(folder: Path, **changes: Any) -> RunConfig:
    path = folder / "rows.jsonl"
    rows = [{"prompt": question, "completion": answer} for question, answer in ANSWERS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = RunConfig(
        model=Model(path="tiny:t5"),
        objective=Objective(name="seq2seq"),
        peft=Peft(method="full"),
        data=Data(
            train=(str(path),),
            eval=(str(path),),
            max_seq_len=8,
            max_target_len=8,
            packing=False,
            cache="",
        ),
        optim=Optim(learning_rate=1e-2),
        train=Train(
            output_dir=str(folder / "run"), num_steps=30, micro_batch_size=3, compilation_cache=""
        ),
        eval=Eval(batch_size=3, every_steps=30, exact_match=True, max_new_tokens=8),
        log=Log(progress="off", tensorboard=False, plot=False),
    )
    return dataclasses.replace(base, **changes)


def test_a_run_learns_answers_goes_on_and_is_exported(tmp_path: Path):
    import torch
    import transformers

    cfg = run_config(tmp_path)
    first = train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=10)))
    assert first.steps == 10
    result = train(cfg)
    assert result.steps == 30
    rows = [json.loads(line) for line in result.paths["metrics"].read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < 0.75 * losses[0]
    assert result.metrics["eval_exact_match"] == 1.0 and result.metrics["eval_accuracy"] == 1.0
    folder = result.paths["merged"]
    session = load(folder)
    assert session.generate(list(ANSWERS), max_new_tokens=8) == list(ANSWERS.values())
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    ids = torch.tensor([session.tokenizer("ten").input_ids])
    written = theirs.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)[0]
    assert session.tokenizer.decode(written, skip_special_tokens=True) == "diez"
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("one\ntwo\n")
    arguments = ["--model", str(folder), "--file", str(prompts), "--out", str(out)]
    generate.answer_file(session, generate.parse_arguments(arguments), {"max_new_tokens": 8})
    answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    assert answers == ["uno", "dos"]
    with pytest.raises(ConfigError, match="logits of an encoder-decoder"):
        session.logits([[3, 4]])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of each other
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "freeze", "qlora"])
def test_methods(method: str, tmp_path: Path):
    import peft
    import transformers

    adapter = method != "freeze"
    name = "lora" if method == "qlora" else method
    options: dict[str, Any] = {"rank": 16} if name in ("lora", "dora") else {}
    cfg = run_config(tmp_path, peft=Peft(method=name, **options))
    cfg = dataclasses.replace(
        cfg,
        checkpoint=Checkpoint(export_merged=adapter),
        quant=dataclasses.replace(cfg.quant, format=("nf4",) if method == "qlora" else ()),
        mesh=Mesh(fsdp=2, tensor=2, data=2) if method == "lora" else cfg.mesh,
        train=dataclasses.replace(cfg.train, num_steps=60),
    )
    result = train(cfg)
    assert result.metrics["eval_loss"] < 2.5
    session = load(result.paths["merged"])
    if not adapter:
        return
    # Exported on the original base: adapter and merged model are the same.
    base = load("tiny:t5", result.paths["adapter"])
    if method != "qlora":
        questions = list(ANSWERS)
        assert base.generate(questions, max_new_tokens=8) == session.generate(
            questions, max_new_tokens=8
        )
    fields = json.loads((result.paths["adapter"] / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_2_SEQ_LM"
    hf = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.paths["merged"])
    assert peft.PeftModel.from_pretrained(hf, str(result.paths["adapter"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.packing": True}, "set data.packing=false"),
        ({"data.streaming": True, "train.num_steps": 3}, "cuts rows in two"),
        ({"data.overlong": "split"}, "data.overlong=split is for rows of one text"),
        ({"data.template": "chatml"}, "joins the texts before an answer"),
        ({"peft.method": "prefix"}, "has one stack of layers to work on"),
        ({"peft.method": "llama_pro"}, "has one stack of layers to work on"),
        ({"peft.target_modules": ("embed",)}, "neither the encoder's embedding"),
        ({"peft.layers_to_transform": (0,)}, "numbers the encoder's layers and the decoder's"),
        ({"model.attention": "pallas_tpu"}, "has no bias by distance"),
        ({"mesh.sequence": 2}, "use mesh.data, mesh.fsdp or mesh.tensor"),
        ({"mesh.stage": 2}, "use mesh.data, mesh.fsdp or mesh.tensor"),
        ({"train.attention_group": 4}, "train.attention_group is for objective.name=sft"),
        ({"objective.name": "sft"}, "max_target_len=16 would be ignored"),
    ],
)
def test_options_of_other_objectives_are_refused(options: dict[str, Any], message: str):
    given = {
        "data.train": ("x",),
        "data.packing": False,
        "data.max_target_len": 16,
        "objective.name": "seq2seq",
    }
    sections: dict[str, dict[str, Any]] = {}
    for key, value in (given | options).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    with pytest.raises(ConfigError, match=message):
        config.resolve(sections)


@pytest.mark.parametrize("method", ["lisa", "badam"])
def test_layers_in_turn_are_refused(method: str, tmp_path: Path):
    cfg = run_config(tmp_path, peft=Peft(method=method))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="differ in what they attend to"):
        build.describe(cfg, mesh, open_checkpoint("tiny:t5"))
