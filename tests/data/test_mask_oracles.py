"""Token ids and masks of real rows against transformers, TRL 1.16 and LLaMA-Factory 0.9.5.

transformers finds masks by `{% generation %}` markers, and TRL trains on what these say, with
copies of the families' templates that have markers; those here mark the same text. LLaMA-Factory
encodes the parts of a conversation one by one; its rule (`Template._encode` and
`SupervisedDatasetProcessor._encode_data_example`) is written out below. Both also train the line
break behind `<|im_end|>`, which no model is asked to write: jaxtune leaves it out.
"""

import json

import numpy as np
import pytest

from jaxtune.data import Example, Message, load_tokenizer
from jaxtune.data.rows import RowError
from jaxtune.data.templates import TEMPLATES
from jaxtune.data.tokenize import chat_of, rows_of
from tests.data.conftest import SHARED

SYSTEM = {"role": "system", "content": "Be kind."}
HEADERS = TEMPLATES["llama3"].tokens
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# For one answer only; the models' own template shows an empty thought in the last one.
QWEN3_MARKED = CHATML_MARKED.replace("{{ m.content + ", "{{ EMPTY + m.content + ", 1).replace(
    "EMPTY", "'<think>\n\n</think>\n\n'"
)
LLAMA3_MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)


def single_turns(count):
    path = SHARED / "sft" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("the shared data are not here")
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(count), file, strict=False):
            row = json.loads(line)
            yield [
                SYSTEM,
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]


def many_turns(count):
    path = SHARED / "chat" / "fastchat_dummy_conversation.json"
    if not path.exists():
        pytest.skip("the shared data are not here")
    roles = {"human": "user", "gpt": "assistant"}
    for row in json.loads(path.read_text(encoding="utf-8"))[:count]:
        turns = [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]]
        yield [SYSTEM, *turns]


def llama3_tokenizer(path):
    """SmolLM2's vocabulary with Llama 3's markers, BOS and way to split text."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = load_tokenizer(path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*HEADERS, "<|begin_of_text|>"]})
    tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["llama3"].jinja
    return tokenizer


def smollm_tokenizer(path):
    return load_tokenizer(path)


def qwen3_tokenizer(path):
    return load_tokenizer(path, template="qwen3")


MODELS = {
    "smollm": (smollm_tokenizer, CHATML_MARKED, (single_turns, many_turns)),
    "llama3": (llama3_tokenizer, LLAMA3_MARKED, (single_turns, many_turns)),
    "qwen3": (qwen3_tokenizer, QWEN3_MARKED, (single_turns,)),
}


def ours(tokenizer, conversations):
    examples = [
        Example(tuple(Message(m["role"], m["content"]) for m in messages))
        for messages in conversations
    ]
    for made in rows_of(chat_of(tokenizer), examples, "answers"):
        assert not isinstance(made, RowError), made
        (row,) = made
        yield row.tokens.tolist(), row.trained.tolist()


def marked(tokenizer, template, messages):
    """transformers' ids and mask by the markers of a template."""
    made = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    return made["input_ids"], [bool(flag) for flag in made["assistant_masks"]]


def by_parts(tokenizer, messages):
    """LLaMA-Factory's ids and labels: each turn is encoded by itself, answers are labels."""
    if tokenizer.bos_token == "<|begin_of_text|>":
        start, end, thought = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""
    else:
        start, end, thought = "<|im_start|>{}\n", "<|im_end|>\n", ""
    if "think" in tokenizer.chat_template:
        thought = "<think>\n\n</think>\n\n"
    ids, mask = [], []

    def add(text, is_label):
        part = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(part)
        mask.extend([is_label] * len(part))

    if tokenizer.bos_token == "<|begin_of_text|>":
        ids.append(tokenizer.bos_token_id)
        mask.append(False)
    prompt = ""
    for message in messages:
        if message["role"] == "assistant":
            add(prompt + start.format("assistant"), False)
            add(thought + message["content"] + end, True)
            prompt = ""
        else:
            prompt += start.format(message["role"]) + message["content"] + end
    return ids, mask


def without_line_breaks(tokenizer, ids, mask):
    """The mask without line breaks behind the token that ends a turn."""
    line_break, end = tokenizer.encode("\n"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, mask = np.array(ids), np.array(mask)
    behind = np.flatnonzero((ids[1:] == line_break[0]) & (ids[:-1] == end)) + 1
    mask[behind] = False
    return mask.tolist()


def check(name, path, count):
    make, template, sets = MODELS[name]
    tokenizer = make(path)
    for rows in sets:
        conversations = list(rows(count))
        assert len(conversations) == count
        made = ours(tokenizer, conversations)
        for messages, (ids, mask) in zip(conversations, made, strict=True):
            # Llama 3's template trims; LLaMA-Factory does not, so it gets trimmed texts.
            trimmed = [{**m, "content": m["content"].strip()} for m in messages]
            for their_ids, theirs in (
                marked(tokenizer, template, messages),
                by_parts(tokenizer, trimmed if name == "llama3" else messages),
            ):
                assert ids == their_ids
                assert mask == without_line_breaks(tokenizer, their_ids, theirs)
                assert sum(theirs) - sum(mask) == (
                    0 if name == "llama3" else sum(m["role"] == "assistant" for m in messages)
                )


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_those_of_the_others(name, smollm_path):
    check(name, smollm_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_rows_equal_those_of_the_others(name, smollm_path):
    check(name, smollm_path, 500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"), [("qwen3", "qwen3_training"), ("llama3", "llama3_training")]
)
def test_templates_with_markers_of_trl(name, file, smollm_path):
    """TRL's own training templates: through our markers, and against the template without them."""
    from tests.data.test_templates import files_of_trl

    make, _, sets = MODELS[name]
    template = (files_of_trl() / f"{file}.jinja").read_text(encoding="utf-8")
    tokenizer = make(smollm_path)
    conversations = [messages for rows in sets for messages in rows(500)]
    plain = list(ours(tokenizer, conversations))
    tokenizer.chat_template = template
    through_markers = ours(tokenizer, conversations)
    for messages, (ids, mask), (ids_marked, mask_marked) in zip(
        conversations, plain, through_markers, strict=True
    ):
        their_ids, theirs = marked(tokenizer, template, messages)
        assert ids_marked == their_ids == ids and mask_marked == theirs
        assert mask == without_line_breaks(tokenizer, their_ids, theirs)
