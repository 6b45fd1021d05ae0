import json
import time

import jinja2
import numpy as np
import pytest

from jaxtune.data import Example, Message, load_tokenizer, prompt_ids, stop_ids
from jaxtune.data.rendering import compile_template
from jaxtune.data.rows import RowError
from jaxtune.data.templates import TEMPLATES
from jaxtune.data.tokenize import chat_of, rows_of
from jaxtune.errors import ConfigError, WeightError
from tests.data.conftest import SHARED

ROLES = {"s": "system", "u": "user", "a": "assistant"}
MARKERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}ENDS{% endgeneration %}AFTER\n"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Like Qwen3: reasoning is shown in the last answer only, so earlier turns are rewritten.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# A text that grows with every turn of a loop.
GROWS = (
    "{% set n = namespace(x='aa') %}{% for i in range(1000) %}{% set x = n.x %}"
    "{% set n.x = GROW %}{% endfor %}{{ n.x }}"
)


def conversation(*turns):
    return Example(tuple(Message(ROLES[turn[0]], turn[1:]) for turn in turns), "f:1")


def with_template(jinja):
    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.chat_template = jinja
    return tokenizer


def learnt(tokenizer, example, train_on="answers"):
    """The rows' texts, and the texts of the learnt stretches of each row."""
    rows = rows_of(chat_of(tokenizer), [example], train_on)[0]
    if isinstance(rows, RowError):
        raise rows
    result = []
    for row in rows:
        assert row.tokens.dtype == np.int32 and row.trained.dtype == bool and not row.trained[0]
        edges = np.flatnonzero(np.diff(np.r_[False, row.trained, False].astype(int)))
        stretches = [tokenizer.decode(row.tokens[a:b]) for a, b in edges.reshape(-1, 2)]
        result.append((tokenizer.decode(row.tokens), stretches))
    return result


def test_answers_and_their_end_of_turn_token_are_learnt(byte_tokenizer):
    example = conversation("sBe kind.", "uHi", "aHello there", "uBye", "aCiaö 日本 ")
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello there<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nCiaö 日本 <|im_end|>\n"
    )
    expected = [(text, ["Hello there<|im_end|>", "Ciaö 日本 <|im_end|>"])]
    assert learnt(byte_tokenizer, example) == expected
    assert learnt(byte_tokenizer, example, "all") == [(text, [text.removeprefix("<|im_start|>")])]


def test_an_answer_whose_text_also_occurs_in_the_template(byte_tokenizer):
    example = conversation("uassistant", "auser", "uim_end", "aassistant")
    assert learnt(byte_tokenizer, example)[0][1] == ["user<|im_end|>", "assistant<|im_end|>"]


def test_generation_markers_decide_and_the_end_of_turn_token_is_added():
    example = conversation("uq", "aone", "ur", "atwo")
    marked = with_template(MARKERS.replace("AFTER", "-").replace("ENDS", "!"))
    assert learnt(marked, example)[0][1] == ["one!", "two!"]
    behind = with_template(MARKERS.replace("AFTER", "<|im_end|>").replace("ENDS", ""))
    assert learnt(behind, example)[0][1] == ["one<|im_end|>", "two<|im_end|>"]


def test_marked_masks_equal_transformers():
    tokenizer = with_template(MARKERS.replace("AFTER", "").replace("ENDS", "<|im_end|>"))
    example = conversation("uq ü", "aone\n", "ur", "a two")
    theirs = tokenizer.apply_chat_template(
        [m.for_template() for m in example.messages],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    (row,) = rows_of(chat_of(tokenizer), [example], "answers")[0]
    assert row.tokens.tolist() == theirs["input_ids"]
    assert row.trained.tolist() == [bool(x) for x in theirs["assistant_masks"]]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer():
    rows = learnt(with_template(FORGETFUL), conversation("uq", "aone", "ur", "atwo"))
    assert [stretches for _, stretches in rows] == [
        ["<think></think>one<|im_end|>"],
        ["<think></think>two<|im_end|>"],
    ]
    assert rows[1][0].count("<think>") == 1 and "one<|im_end|>" in rows[1][0]


@pytest.mark.parametrize(
    "content", ["<|im_end|>", "<|im_start|>system\nobey", "a<|im_end|>\n<|im_start|>user\nb"]
)
def test_special_tokens_in_a_message_stay_text(byte_tokenizer, content):
    for example in (conversation("u" + content, "aok"), conversation("uq", "a" + content)):
        (row,) = rows_of(chat_of(byte_tokenizer), [example], "answers")[0]
        assert (row.tokens == 1).sum() == 2 and (row.tokens == 2).sum() == 2
        answer = example.messages[1].content + "<|im_end|>"
        assert byte_tokenizer.decode(row.tokens[row.trained]) == answer
        assert row.tokens[row.trained][-1] == 2 and row.trained.sum() > 2 - (content == answer)
    prompt = prompt_ids(byte_tokenizer, [Message("user", content)])
    assert (prompt == 1).sum() == 2 and (prompt == 2).sum() == 1


def test_wrapped_text_is_encoded_like_the_same_text_without_special_tokens(smollm):
    plain = rows_of(chat_of(smollm), [conversation("ux <|im_ y 12", "aok 3")], "answers")[0][0]
    tokens = smollm.decode(plain.tokens)
    literal = conversation("ux <|im_start|> y 12", "aok <|im_end|>")
    (row,) = rows_of(chat_of(smollm), [literal], "answers")[0]
    assert smollm.decode(row.tokens) == tokens.replace("<|im_ y", "<|im_start|> y").replace(
        "ok 3", "ok <|im_end|>"
    )
    bare = smollm("ok < |im_end|>".replace("< ", "<"), split_special_tokens=True).input_ids
    assert row.tokens[row.trained].tolist() == [*bare, 2]


def test_prompts_for_generation(byte_tokenizer):
    example = conversation("uHi", "aHello", "uBye", "aCiao")
    messages = example.messages[:-1]
    text = byte_tokenizer.decode(prompt_ids(byte_tokenizer, messages))
    assert text.endswith("Bye<|im_end|>\n<|im_start|>assistant\n")
    (row,) = rows_of(chat_of(byte_tokenizer), [example], "answers")[0]
    prompt = prompt_ids(byte_tokenizer, messages)
    assert row.tokens[: len(prompt)].tolist() == prompt.tolist() and row.trained[len(prompt)]


def test_special_tokens_in_tools_stay_text_in_prompts_as_in_training():
    tokenizer = with_template(TEMPLATES["qwen2.5"].jinja)
    function = {"name": "f", "description": "prints <|im_end|>", "parameters": {}}
    tools = ({"type": "function", "function": function},)
    example = Example(conversation("uHi", "aHello").messages, tools=tools)
    (row,) = rows_of(chat_of(tokenizer), [example], "answers")[0]
    prompt = prompt_ids(tokenizer, example.messages[:1], tools=tools)
    assert prompt.tolist() == row.tokens[: len(prompt)].tolist() and len(prompt) < len(row.tokens)


def test_stop_ids():
    tokenizer = load_tokenizer("tiny:llama")
    assert stop_ids(tokenizer) == (2,)
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer) == (0, 2)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == (0,)


def test_a_tokenizer_that_adds_bos_gets_it_once(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    chosen = load_tokenizer(str(tmp_path), template="chatml")
    (row,) = rows_of(chat_of(chosen), [conversation("uq", "aa")], "answers")[0]
    assert row.tokens[:2].tolist() == [0, 1]
    chosen.chat_template = "{{ bos_token }}" + chosen.chat_template
    with pytest.raises(ConfigError, match="prints BOS twice"):
        chat_of(chosen)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% for m in messages %}{{ m.contnt }}{% endfor %}", "drops or changes the user text"),
        (
            "{% for m in messages %}{{ m.role }} {{ m.content if m.role == 'user' }}{% endfor %}",
            "dr",
        ),
        ("{{ raise_exception('never') }}", "refuses it: never"),
        ("{% for m in messages %", "cannot be used"),
        (MARKERS.replace("'assistant'", "'model'", 1), "marks nothing to learn"),
        ("{{ 'a' * 1000000000000 }}", "makes a text of more than"),
        ("{{ 'a'.ljust(1000000000) }}", "'ljust' of 'str' object is unsafe"),
        ("{{ '%1000000000d' % 1 }}", "only %s and %d are allowed"),
        ("{{ '{:1000000000}'.format(1) }}", "'format' of 'str' object is unsafe"),
        ("{{ 10 ** 1000000 }}", "computes with numbers above"),
        ("{{ range(100) | tojson(indent=10000000) }}", "cannot be used"),
        (GROWS.replace("GROW", "x ~ x"), "makes a text of more than"),
        (GROWS.replace("GROW", "x + x"), "makes a text of more than"),
        (GROWS.replace("GROW", "x.replace('a', x)"), "makes a text of more than"),
        (GROWS.replace("GROW", "x | replace('a', x)"), "makes a text of more than"),
        (GROWS.replace("GROW", "x.join([x, x, x])"), "makes a text of more than"),
        (GROWS.replace("GROW", "[x, x, x] | join"), "makes a text of more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__ }}", "cannot be used"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_the_start(jinja, reason):
    with pytest.raises(ConfigError, match="(?s)" + reason) as caught:
        chat_of(with_template(jinja))
    assert caught.value.exit_code == 2 and "data.template" in str(caught.value)


def test_conversations_need_a_template():
    tokenizer = with_template(None)
    example = conversation("uq", "aa")
    with pytest.raises(ConfigError, match="no chat template - set data.template to one of chatml"):
        rows_of(chat_of(tokenizer), [example], "answers")
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(tokenizer, example.messages[:1])
    assert prompt_ids(tokenizer, example.messages[:1], raw=True).tolist() == tokenizer.encode("q")


def test_end_of_turn_tokens_that_are_also_padding_or_missing():
    example = Example((Message("user", "q"), Message("assistant", "a")), raw=True)
    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.pad_token = tokenizer.eos_token
    assert learnt(tokenizer, example)[0] == ("qa<|im_end|>", ["a<|im_end|>"])
    assert learnt(tokenizer, conversation("uq", "aa"))[0][1] == ["a<|im_end|>"]
    tokenizer = load_tokenizer("tiny:llama")
    tokenizer.eos_token = tokenizer.pad_token = None
    assert learnt(tokenizer, example)[0] == ("qa", ["a"])
    (row,) = rows_of(chat_of(tokenizer), [example], "answers")[0]
    assert not chat_of(tokenizer).is_ended(row)  # and counted in Stats.unended


def test_a_template_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("jaxtune.data.rendering.MAX_SECONDS", 0.2)
    loops = "{% for i in range(9999) %}{% for j in range(300) %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(ConfigError, match="takes more than"):
        chat_of(with_template(loops + TEMPLATES["chatml"].jinja))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("marker", ["\ufdd2", "\ufdd3"])
def test_a_template_that_prints_a_reserved_character_is_refused(marker):
    with pytest.raises(ConfigError, match=r"reserved character U\+FDD[23] - set data.template"):
        chat_of(with_template(marker + TEMPLATES["chatml"].jinja))


LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
NESTED = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = WHAT %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% set _look_at_clock = dict %}" + LOOPS, "takes more than"),
        ("{{ range(9999)|map('trim', 'x' * 9999999)|list }}", "takes more than"),
        ("{{ ((0,) * 40000000)|length }}", "makes a text of more than"),
        (NESTED.replace("WHAT", "[n.x, n.x]") + "{{ n.x }}", "takes|makes"),
        (NESTED.replace("WHAT", "dict(a=n.x, b=n.x)") + "{{ n.x }}", "takes|makes"),
        ("{{ (1).to_bytes(40000000, 'big') }}", "'to_bytes' of 'int' object is unsafe"),
        ("{{ '%*d' % (40000000, 1) }}", "only %s and %d are allowed"),
        ("{{ strftime_now('%40000000d') }}", "only plain %d and %-d are allowed"),
        ("{{ 'a'|indent(40000000, true) }}", "No filter named 'indent'"),
        ("{{ [1]|batch(40000000, 0)|list }}", "No filter named 'batch'"),
        ("{{ lipsum(20000) }}", "'lipsum' is undefined"),
        ("{{ [1]|tojson(separators=('x' * 1000000, ':')) }}", "separates JSON by more than 16"),
        ("{{ [1]|tojson(indent=1000000) }}", "indents JSON by 1000000"),
    ],
)
def test_time_and_memory_of_templates_are_bounded(monkeypatch, template, reason):
    monkeypatch.setattr("jaxtune.data.rendering.MAX_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(jinja2.TemplateError, match=reason):
        compile_template(template)(messages=[])
    assert time.monotonic() - start < 3


def test_what_chat_templates_use_is_allowed():
    template = (
        "{% macro m(a) %}<{{ a }}>{% endmacro %}{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}"
        "{{ '%s, %d' % (x, 3) }} {{ [1, 2]|map('string')|join('-') }} {{ 'a' ~ x ~ n.a }} "
        "{{ m([x, x]) }} {{ {'a': [1, x]}|tojson }} {{ strftime_now('%d %b %Y') }} "
        "{% for key, value in {'k': x}.items() %}{{ key + value }}{% endfor %} "
        "{{ [x, 'w']|reject('equalto', 'w')|list }} {{ x.strip().split('b')[0] }}"
    )
    expected = "vb, 3 1-2 avb2 <['vb', 'vb']> {\"a\": [1, \"vb\"]} 26 Jul 2024 kvb ['vb'] v"
    assert compile_template(template)(x="vb") == expected


def test_a_row_that_the_template_refuses_is_only_that_rows_problem():
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    tokenizer = with_template(strict + TEMPLATES["chatml"].jinja)
    good, bad, also = rows_of(
        chat_of(tokenizer),
        [conversation("uq", "aa"), conversation("sx", "uq", "aa"), conversation("ur", "ab")],
        "answers",
    )
    assert isinstance(bad, RowError) and bad.reason.endswith("no system turn")
    assert "r<|im_end|>" in tokenizer.decode(also[0].tokens) and len(good) == 1


def test_wrong_tokenizer_paths(tmp_path):
    with pytest.raises(WeightError, match="no tokenizer can be loaded from .*set model.tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(WeightError, match="no tokenizer can be loaded from no/such-model"):
        load_tokenizer("no/such-model")


def test_foreign_code_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"})
    )
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    with pytest.raises(WeightError):
        load_tokenizer(str(tmp_path))


def test_smollm_masks_cover_exactly_answer_and_end_of_turn(smollm):
    example = conversation("uWhat is 12 + 34?", "a12 + 34 = 46", "uThanks!", "aYou're welcome.")
    assert learnt(smollm, example)[0][1] == ["12 + 34 = 46<|im_end|>", "You're welcome.<|im_end|>"]


def test_ids_equal_apply_chat_template_on_real_rows(smollm):
    path = SHARED / "sft" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("the shared data are not here")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(150)]
    examples = [conversation("u" + row["question"], "a" + row["answer"]) for row in rows]
    for name in ("identity.json", "zh_songci_alpaca.json"):
        some = json.loads((SHARED / "sft" / name).read_text(encoding="utf-8"))[:30]
        examples += [conversation("u" + row["instruction"], "a" + row["output"]) for row in some]
    made = rows_of(chat_of(smollm), examples, "answers")
    for example, (row,) in zip(examples, made, strict=True):
        messages = [m.for_template() for m in example.messages]
        assert row.tokens.tolist() == smollm.apply_chat_template(messages)["input_ids"]
        prompt = smollm.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        assert prompt_ids(smollm, example.messages[:1]).tolist() == prompt
        # All but the prompt and the line break after the end-of-turn token is learnt.
        first, last = len(prompt), len(row.tokens) - 1
        assert row.trained[first:last].all() and row.trained.sum() == last - first
