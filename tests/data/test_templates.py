"""Built-in chat templates against the texts that the models were trained on.

The strings below are those of the model cards; where another package ships a model's template
(trl, fastchat, llamafactory), a slow test compares with it, if it is installed.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxtune.data import Example, Message, load_tokenizer
from jaxtune.data.rendering import compile_template
from jaxtune.data.rows import RowError
from jaxtune.data.templates import TEMPLATES
from jaxtune.data.tokenize import chat_of, rows_of, stop_ids
from jaxtune.errors import ConfigError
from tests.data.conftest import SHARED

S, U, A = "Be kind.", "Hi", "Hello"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA31 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Ciao<|im_end|>\n",
)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def llama3(system):
    return (
        f"{header('system')}{system}<|eot_id|>{header('user')}Hi<|eot_id|>"
        f"{header('assistant')}Hello<|eot_id|>{header('user')}Bye<|eot_id|>{header('assistant')}",
        "Ciao<|eot_id|>",
    )


# system, user, assistant, user as a prompt; what the last answer adds. <s>, </s> are BOS and EOS.
PUBLISHED = {
    "chatml": CHATML,
    "yi": CHATML,
    "internlm2": CHATML,
    "qwen2.5": CHATML,
    "qwen3": (CHATML[0], "<think>\n\n</think>\n\nCiao<|im_end|>\n"),
    "llama2": (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
        " Ciao </s>",
    ),
    "llama3": llama3("Be kind."),
    "llama3.1": llama3(f"{LLAMA31}Be kind."),
    "mistral": ("[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]", " Ciao</s>"),
    "mistral_v3": ("[INST] Hi[/INST] Hello</s>[INST] Be kind.\n\nBye[/INST]", " Ciao</s>"),
    "mistral_v7": (
        "[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello</s>[INST]Bye[/INST]",
        "Ciao</s>",
    ),
    "chatglm2": (
        "[gMASK]sopBe kind.\n\n[Round 1]\n\n问：Hi\n\n答：Hello\n\n[Round 2]\n\n问：Bye\n\n答：",
        "Ciao",
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello<|user|>\nBye"
        "<|assistant|>\n",
        "Ciao",
    ),
    "glm4": (
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello<|user|>\nBye"
        "<|assistant|>\n",
        "Ciao",
    ),
    "baichuan2": (
        "Be kind.<reserved_106>Hi<reserved_107>Hello<reserved_106>Bye<reserved_107>",
        "Ciao",
    ),
    "gemma": (
        "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>"
        "\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "Ciao<end_of_turn>\n",
    ),
    "phi3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n",
        "Ciao<|end|>\n</s>",
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "Ciao<|im_end|>",
    ),
    "deepseek": (
        "Be kind.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>",
        "Ciao<｜end▁of▁sentence｜>",
    ),
    "vicuna": ("Be kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:", " Ciao</s>"),
    "alpaca": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
        "### Instruction:\nBye\n\n### Response:\n",
        "Ciao</s>",
    ),
}
# Without a system text, where the template has one of its own.
DEFAULTS = {
    "qwen2.5": f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\n",
    "llama3.1": f"{header('system')}{LLAMA31}<|eot_id|>{header('user')}",
    "vicuna": f"{VICUNA} USER: ",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n",
}
CONVERSATION = tuple(
    Message(role, text)
    for role, text in zip(
        ("system", "user", "assistant", "user", "assistant"), (S, U, A, "Bye", "Ciao"), strict=True
    )
)


def tokenizer_for(name, jinja=None):
    """The byte tokenizer with the tokens that a template needs, <s> and </s>."""
    tokenizer = load_tokenizer("tiny:llama")
    needed = [*TEMPLATES[name].tokens, "<s>", "</s>"] if name in TEMPLATES else ["<s>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": needed})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = jinja or TEMPLATES[name].jinja
    return tokenizer


def render(name, messages, prompt=False, tools=()):
    return chat_of(tokenizer_for(name)).render(messages, prompt=prompt, tools=tools)[0]


def test_every_template_has_its_text():
    assert set(PUBLISHED) == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_mask_are_the_published_ones(name):
    prompt, answer = PUBLISHED[name]
    assert render(name, CONVERSATION[:4], prompt=True) == prompt
    assert render(name, CONVERSATION) == prompt + answer
    if name in DEFAULTS:
        assert render(name, CONVERSATION[1:2]).startswith(DEFAULTS[name] + "Hi")
    tokenizer = tokenizer_for(name)
    chat = chat_of(tokenizer)
    for example in (Example(CONVERSATION), Example(CONVERSATION[:3])):
        rows = rows_of(chat, [example], "answers")[0]
        assert not isinstance(rows, RowError) and chat.is_ended(rows[-1])
        learnt = tokenizer.decode(rows[-1].tokens[rows[-1].trained])
        said = example.messages[-1].content
        # The last answer, and what ends it: EOS where the template itself adds nothing.
        end = answer.partition("Ciao")[2].rstrip() or "</s>"
        assert learnt.endswith(said + end)
        first = tokenizer.decode(rows[0].tokens[rows[0].trained])
        assert first.strip().removeprefix("<think>\n\n</think>\n\n").startswith("Hello")


def test_the_next_role_ends_an_answer_of_glm():
    tokenizer = tokenizer_for("glm4")
    (row,) = rows_of(chat_of(tokenizer), [Example(CONVERSATION)], "answers")[0]
    assert tokenizer.decode(row.tokens[row.trained]) == "Hello<|user|>Ciao</s>"


@pytest.mark.parametrize(
    ("name", "token"),
    [("glm4", "<|user|>"), ("chatglm3", "<|user|>"), ("baichuan2", "<reserved_106>")],
)
def test_what_is_learnt_to_end_an_answer_stops_generation(name, token):
    tokenizer = tokenizer_for(name)
    ids = tokenizer.convert_tokens_to_ids(["</s>", token])
    assert stop_ids(tokenizer) == tuple(ids)


CALLS = (
    Message("user", "Weather?"),
    Message(
        "assistant",
        "",
        tool_calls=(
            {"type": "function", "function": {"name": "get_weather", "arguments": {"x": "é"}}},
        ),
    ),
    Message("tool", "27 degrees", name="get_weather"),
    Message("assistant", "It is sunny."),
    Message("user", "Thanks"),
    Message("assistant", "Welcome", reasoning="be polite"),
)
TOOLS = (
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {}}},
)
WITH_TOOLS = ("qwen2.5", "qwen3", "llama3.1")


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_are_printed_or_refused(name):
    tokenizer = tokenizer_for(name)
    example = Example(CALLS[:4], tools=TOOLS)
    rows = rows_of(chat_of(tokenizer), [example], "answers")[0]
    if name not in WITH_TOOLS:
        assert isinstance(rows, RowError)
        calm = rows_of(chat_of(tokenizer), [Example(CONVERSATION, tools=TOOLS)], "answers")[0]
        assert isinstance(calm, RowError) and "data.template=qwen2.5" in calm.reason
        return
    assert not isinstance(rows, RowError)
    text = tokenizer.decode(rows[-1].tokens)
    assert text.count('"é"') == 1 and "27 degrees" in text and '"description": "d"' in text


def test_thinking(tmp_path):
    def tokenizer(value):
        made = tokenizer_for("qwen3")
        made.save_pretrained(tmp_path)
        return load_tokenizer(str(tmp_path), enable_thinking=value)

    messages = CALLS[4:]
    for value, learnt in (
        (None, "<think>\nbe polite\n</think>\n\nWelcome<|im_end|>"),
        (True, "<think>\nbe polite\n</think>\n\nWelcome<|im_end|>"),
    ):
        loaded = tokenizer(value)
        (row,) = rows_of(chat_of(loaded), [Example(messages)], "answers")[0]
        assert loaded.decode(row.tokens[row.trained]) == learnt
    plain = (messages[0], Message("assistant", "Welcome"))
    for value, learnt in ((True, "<think>\n\n</think>\n\nWelcome"), (False, "Welcome")):
        loaded = tokenizer(value)
        (row,) = rows_of(chat_of(loaded), [Example(plain)], "answers")[0]
        assert loaded.decode(row.tokens[row.trained]) == f"{learnt}<|im_end|>"
        # What is saved with the model has the same default, and a caller may still choose.
        text = loaded.apply_chat_template(
            [{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("</think>\n\n") != value
    with pytest.raises(ConfigError, match="enable_thinking=True: the chat template has no such"):
        load_tokenizer("tiny:llama", enable_thinking=True)


PADDLE = {
    "system": "<s>{{ system | default('Be good.') }}\n",
    "conversation": ["\n[INST] {{user}} [/INST]", " {{bot}}{% if index == 0 %}!{% endif %}</s>\n"],
    "query": "\n[INST] {{query}} [/INST]",
}


def test_templates_of_paddlenlp(tmp_path):
    path = tmp_path / "chat_template.json"
    path.write_text(json.dumps(PADDLE))
    loaded = load_tokenizer("tiny:llama", template=str(path))
    loaded.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    chat = chat_of(loaded)
    expected = "<s>Be kind.\n\n[INST] Hi [/INST] Hello!</s>\n\n[INST] Bye [/INST]"
    assert chat.render(CONVERSATION[:4], prompt=True)[0] == expected
    assert chat.render(CONVERSATION)[0] == expected + " Ciao</s>\n"
    assert chat.render(CONVERSATION[1:2])[0] == "<s>Be good.\n\n[INST] Hi [/INST]"
    (row,) = rows_of(chat, [Example(CONVERSATION)], "answers")[0]
    assert loaded.decode(row.tokens[row.trained]) == " Hello!</s> Ciao</s>"
    path.write_text('{"conversation": ["{{user}}"]}')
    with pytest.raises(ConfigError, match="is no chat template of PaddleNLP"):
        load_tokenizer("tiny:llama", template=str(path))
    with pytest.raises(ConfigError, match="is no chat template of PaddleNLP"):
        load_tokenizer("tiny:llama", template=str(tmp_path / "none.json"))


def files_of_trl() -> Path:
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package trl is not installed")
    return Path(found.submodule_search_locations[0]) / "chat_templates"


OF_TRL = {
    "llama3": ("llama3", "<s>"),
    "llama3.1": ("llama3_1", "<s>"),
    "qwen2.5": ("qwen2_5", ""),
    "qwen3": ("qwen3", ""),
    "gemma": ("gemma3", "<s>"),
    "phi3": ("phi3", ""),
    "deepseek": ("deepseekv3", "<s>"),
}


def real_conversations():
    """Conversations of several turns with odd white space, tools and reasoning."""
    path = SHARED / "chat" / "fastchat_dummy_conversation.json"
    if not path.exists():
        pytest.skip("the shared data are not here")
    roles = {"human": "user", "gpt": "assistant"}
    for row in json.loads(path.read_text(encoding="utf-8")):
        yield [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]]
    yield [m.for_template() for m in CONVERSATION]
    yield [{"role": "user", "content": " a\n "}, {"role": "assistant", "content": "\nb é\n"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TRL)
def test_text_equals_the_models_own_template(name):
    file, bos = OF_TRL[name]
    own = (files_of_trl() / f"{file}.jinja").read_text(encoding="utf-8")
    both = [compile_template(text) for text in (own, bos + TEMPLATES[name].jinja)]
    variables = {"bos_token": bos, "eos_token": "</s>", "tools": None}
    for messages in real_conversations():
        # The one of DeepSeek V3 that trl ships begins answers with a thought.
        waiting = [] if name == "deepseek" else [(len(messages) - 1, True)]
        for count, prompt in ((len(messages), False), *waiting):
            theirs, ours = (
                one(messages=messages[:count], add_generation_prompt=prompt, **variables)
                for one in both
            )
            assert ours == theirs
    if name in WITH_TOOLS:
        messages = [message.for_template() for message in CALLS]
        for count in range(1, len(messages) + 1):
            theirs, ours = (
                one(
                    messages=messages[:count],
                    add_generation_prompt=False,
                    **{**variables, "tools": list(TOOLS)},
                )
                for one in both
            )
            assert ours == theirs
