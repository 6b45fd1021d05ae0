import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxtune import config, schema
from jaxtune.errors import ConfigError

FILE = """from jaxtune import config

def get_config():
    c = config.default()
    c.data.train = ("rows.jsonl",)
    {line}
    return c
"""


def write(folder: Path, line: str = "pass") -> str:
    path = folder / "run.py"
    path.write_text(FILE.format(line=line))
    return str(path)


def parse(folder: Path, *options: str, line: str = "pass") -> schema.RunConfig:
    arguments = [f"--config={write(folder, line)}", *(f"--config.{o}" for o in options)]
    return config.parse_arguments(arguments)


def refusal(folder: Path, *options: str, line: str = "pass") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(folder, *options, line=line)
    return str(caught.value)


def test_defaults_are_those_of_the_schema(tmp_path: Path):
    expected = dataclasses.replace(schema.RunConfig(), data=schema.Data(train=("rows.jsonl",)))
    assert parse(tmp_path) == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft.rank=8", 8),
        ("peft.alpha=8", 8.0),
        ("optim.learning_rate=1e-3", 1e-3),
        ("data.packing=false", False),
        ("data.packing=1", True),
        ("model.revision=main", "main"),
        ("model.revision=None", None),
        ("train.num_steps=12", 12),
        ("train.num_steps=None", None),
        ("data.train=a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data.train=('a b.jsonl',)", ("a b.jsonl",)),
        ("peft.layers_to_transform=(0, 2)", (0, 2)),
        ("peft.layers_to_transform=", ()),
        ("model.path=folder=with,signs", "folder=with,signs"),
        ("mesh.data=-1", -1),
    ],
)
def test_overrides(tmp_path: Path, option: str, value: Any):
    line = "c.mesh.fsdp = 1; c.model.revision = 'old'; c.train.num_steps = 3"
    resolved = parse(tmp_path, option, line=line)
    section, name = option.partition("=")[0].split(".")
    got = getattr(getattr(resolved, section), name)
    assert got == value and type(got) is type(value)


def test_the_last_override_wins(tmp_path: Path):
    assert parse(tmp_path, "peft.rank=2", "peft.rank=3").peft.rank == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("peft.rnk=8", "config.peft.rnk: no such key - did you mean rank?"),
        ("pft.rank=8", "no section 'pft' - did you mean peft?"),
        ("rank=8", "no section 'rank'"),
        ("peft.rank=", "config.peft.rank='': must be int"),
        ("peft.rank=8.5", "config.peft.rank='8.5': must be int"),
        ("peft.rank=0", "config.peft.rank=0: must be >= 1 and <= 65536"),
        ("peft.rank=None", "config.peft.rank='None': must be int"),
        ("optim.learning_rate=fast", "config.optim.learning_rate='fast': must be float"),
        ("optim.learning_rate=-1", "must be >= 0"),
        ("optim.learning_rate=nan", "must be a finite number"),
        ("data.packing=maybe", "config.data.packing='maybe': must be bool"),
        ("peft.layers_to_transform=0,a", "must be int"),
        ("peft.method=lorra", "did you mean lora?"),
        ("data.max_seq_len=4", "config.data.max_seq_len=4: must be >= 8"),
        ("optim.b1=1", "config.optim.b1=1.0: must be >= 0 and <= 1"),
    ],
)
def test_wrong_overrides(tmp_path: Path, option: str, message: str):
    text = refusal(tmp_path, option)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.train="], "config.data.train is empty"),
        (["optim.warmup_steps=2", "optim.warmup_ratio=0.1"], "not both"),
        (["peft.target_modules="], "config.peft.target_modules is empty"),
        (["checkpoint.resume=newest"], "must be auto, never or a step"),
        (["checkpoint.keep_best=1"], "needs eval.every_steps"),
        (["data.eval=a.jsonl", "data.eval_fraction=0.1"], "not both"),
        (["eval.exact_match=true"], "needs held-out rows"),
        (["data.train=a,b,c", "data.repeats=1,2"], "data.repeats has 2 values for 3 sources of"),
        (["data.train=a", "data.max_samples=1,2"], "data.max_samples has 2 values for 1 sources"),
        (["eval.every_steps=3"], "needs held-out rows"),
        (["train.num_epochs=0"], "num_epochs above 0"),
        (["quant.format=nf5"], "must begin with one of int8, int8_block, int4, nf4, fp4"),
        (["quant.format=nf4=(mlp"], "config.quant.format='nf4=(mlp'"),
        (["quant.format=nf4,int8"], "what follows is never used"),
        (["quant.format=nf4", "quant.block_size=96"], "must be a power of two"),
        (["quant.format=int8", "quant.block_size=128"], "would be ignored"),
        (["quant.format=int8", "quant.double_quant=false"], "would be ignored"),
        (["quant.format=nf4", "peft.method=full"], "needs an adapter"),
        (["mesh.data=0"], "config.mesh.data=0"),
        (["mesh.data=-1"], "only one axis may be -1"),
        (["optim.name=adamw8bit", "optim.offload=true"], "bytes in host memory"),
        (["model.offload_frozen=true", "peft.method=full"], "offload_frozen=True would be ignored"),
        (["model.offload_frozen=true", "model.remat=attention"], "attention would keep weights"),
        (["model.offload_frozen=true", "model.layers=unroll"], "fetches layers in a scan"),
        (
            ["data.overlong=truncate_source", "data.max_source_len=500", "peft.method=prompt"],
            "max_source_len=500 must be below max_seq_len=512 less the 20 virtual tokens",
        ),
        (["optim.name=adafactor", "optim.b1=0.9"], "b1=0.9 would be ignored: adafactor has its"),
        (["optim.name=lion", "optim.eps=1e-6"], "eps=1e-06 would be ignored: lion"),
        (["peft.method=tokens"], "trains nothing - name peft.trainable_tokens"),
        (["peft.method=dora", "peft.lora_bias=true"], "peft.method=dora has no bias beside B"),
        (["peft.method=lisa", "model.layers=unroll"], "goes over one stack"),
        (["peft.method=badam", "model.remat=none"], "computes each layer again"),
        (["peft.method=badam", "optim.offload=true"], "keeps state of 2 layers only"),
        (["peft.method=lisa", "quant.format=nf4"], "trains every layer sooner or later"),
        (["optim.name=galore"], "peft.method=lora trains none"),
        (["optim.name=galore8bit", "peft.method=full", "optim.offload=true"], "bytes in host mem"),
        (["optim.projection_rank=4"], "only galore and apollo project gradients"),
        (["peft.method=full", "optim.loraplus_ratio=16"], "has no A and B"),
        (["optim.learning_rate=0", "optim.embedding_learning_rate=1e-4"], "set both"),
        (["peft.method=adalora", "peft.rank=4"], "target_rank=8 must not be above rank=4"),
        (["peft.method=adalora", "optim.name=muon"], "compares all layers after a step"),
        (["peft.init=pissa", "peft.alpha=0"], "peft.init=pissa divides by the adapter's scale"),
        (["peft.init=loftq"], "peft.init=loftq starts from what quantizing loses - set quant.f"),
        (["peft.init=pissa", "peft.loftq_iterations=2"], "loftq_iterations=2 would be ignored"),
        (["peft.pissa_iterations=2"], "would be ignored: needs peft.init=pissa"),
        (
            ["peft.init=loftq", "quant.format=nf4", "checkpoint.merge_base=original"],
            "makes up for what quantizing lost",
        ),
        (["optim.name=muon", "optim.b2=0.9"], "b2=0.9 would be ignored: muon keeps no second"),
    ],
)
def test_contradictions(tmp_path: Path, options: list[str], message: str):
    text = refusal(tmp_path, *options)
    assert message in text and "\n" not in text


def test_all_problems_are_listed(tmp_path: Path):
    text = refusal(tmp_path, "peft.rank=0", "optim.b2=7", "log.progress=loud")
    assert text.startswith("3 problems in the config:\n  config.peft.rank=0")
    assert "config.optim.b2=7.0" in text and "config.log.progress='loud'" in text
    text = refusal(tmp_path, "peft.rnk=8", "optim.lr=7")
    assert "peft.rnk" in text and "optim.lr" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE is missing"),
        (["--config.peft.rank=8"], "--config=FILE is missing"),
        (["--config=absent.py"], "--config=absent.py: no such file"),
        (["--peft.rank=8"], "argument '--peft.rank=8' is not of the form"),
        (["run.py"], "argument 'run.py' is not of the form"),
        (["--config"], "argument '--config' is not of the form"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.parse_arguments(arguments)


@pytest.mark.parametrize(
    ("line", "number", "message"),
    [
        ("c.peft.rank = = 8", 6, "SyntaxError"),
        ("c.peft.rank = 8 / 0", 6, "ZeroDivisionError: division by zero"),
        ("c.peft.rnk = 8", 6, "rnk"),
        ("c.peft.rank = 'eight'", 6, "TypeError"),
        ("import absent_module", 6, "ModuleNotFoundError"),
        ("raise ValueError", 6, "ValueError"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_errors_in_a_config_file_name_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    number: int,
    message: str,
    relative: bool,
):
    path = write(tmp_path, line)
    if relative:
        monkeypatch.chdir(tmp_path)
        path = "run.py"
    with pytest.raises(ConfigError) as caught:
        config.parse_arguments([f"--config={path}"])
    text = str(caught.value)
    assert text.startswith(f"{path}:{number}: ") and message in text
    assert "\n" not in text


def test_a_section_cannot_be_replaced(tmp_path: Path):
    assert refusal(tmp_path, line="c.train = None").startswith("config.train=None: a section")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1",
        "def get_config():\n    return None",
        "def get_config():\n    return 'tiny'",
    ],
)
def test_files_that_give_no_config(tmp_path: Path, text: str):
    path = tmp_path / "run.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.py.*get_config"):
        config.parse_arguments([f"--config={path}"])


def test_a_saved_config_reloads_equal(tmp_path: Path):
    line = "c.train.num_steps = 3; c.peft.layers_to_transform = (0, 2); c.model.revision = 'x'"
    resolved = parse(tmp_path, "peft.alpha=7", line=line)
    assert config.from_json(config.to_json(resolved)) == resolved
    path = tmp_path / "config.json"
    path.write_text(config.to_json(resolved))
    assert config.parse_arguments([f"--config={path}"]) == resolved
    changed = config.parse_arguments([f"--config={path}", "--config.peft.rank=2"])
    assert changed == dataclasses.replace(resolved, peft=dataclasses.replace(resolved.peft, rank=2))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"peft": {"rank": "8"}}',
        '{"peft": 3}',
        "[1]",
        '"a"',
    ],
)
def test_json_that_is_no_config(text: str):
    with pytest.raises(ConfigError):
        config.from_json(text)


def test_a_resolved_config_is_frozen(tmp_path: Path):
    resolved = parse(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.peft.rank = 3  # type: ignore[misc]


def test_help_documents_every_field():
    text = config.usage("jaxtune.train")
    for section, cls in schema.sections().items():
        for field in dataclasses.fields(cls):
            assert f"  --config.{section}.{field.name}=" in text
            assert field.metadata["doc"] in text
            assert all(choice in text for choice in field.metadata["choices"] or ())
    assert "int [1..65536]: rank R" in text


def test_to_json_is_plain_json(tmp_path: Path):
    fields = json.loads(config.to_json(parse(tmp_path)))
    assert list(fields) == list(schema.sections())
    assert fields["data"]["train"] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.overlong=drop --config.data.packer=concat", "concat cuts between rows"),
        ("data.packing=false --config.data.packer=greedy", "needs data.packing=true"),
        ("data.pad_to=longest", "data.packing fills rows"),
        ("data.max_bad_fraction=0.5", "on_bad_row=skip"),
        ("eval.max_new_tokens=9", "eval.exact_match"),
        ("optim.schedule=constant --config.optim.min_lr_ratio=0.1", "is constant"),
    ],
)
def test_options_that_nobody_would_read_are_refused(tmp_path: Path, override: str, why: str):
    path = tmp_path / "run.py"
    path.write_text(
        "from jaxtune import config\ndef get_config():\n"
        "    c = config.default(); c.data.train = ('a.jsonl',); return c\n"
    )
    arguments = f"--config={path} --config.{override}".split()
    with pytest.raises(ConfigError, match=why):
        config.parse_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("('q_proj', 'v_proj')", ("q_proj", "v_proj")),
        ("(q|k)_proj", ("(q|k)_proj",)),
        (r"['layers\\.\\d{1,2}\\.mlp.*']", (r"layers\.\d{1,2}\.mlp.*",)),
    ],
)
def test_tuples_on_the_command_line(tmp_path: Path, text: str, items: tuple[str, ...]):
    path = tmp_path / "run.py"
    path.write_text(
        "from jaxtune import config\ndef get_config():\n"
        "    c = config.default(); c.data.train = ('a.jsonl',); return c\n"
    )
    argument = f"--config.peft.target_modules={text}"
    resolved = config.parse_arguments([f"--config={path}", argument])
    assert resolved.peft.target_modules == items
