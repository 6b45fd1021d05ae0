"""Built-in chat templates, for tokenizers that bring none (`data.template`).

A template here prints no BOS: `tokenize.load_tokenizer` puts `{{ bos_token }}` before it exactly
when the tokenizer itself starts plain text with BOS. `tokens` are the texts that must each be one
token of the vocabulary; a template whose markers would fall to pieces is refused.

Sources: chatml, the OpenAI ChatML notes as in Qwen's tokenizers; llama3, Meta's Llama 3 model card
(without the dates that 3.1 adds); alpaca, github.com/tatsu-lab/stanford_alpaca; vicuna,
github.com/lm-sys/FastChat (vicuna_v1.1).
"""

from typing import NamedTuple


class Template(NamedTuple):
    """A jinja chat template and the tokens that it needs."""

    jinja: str
    tokens: tuple[str, ...] = ()


CHATML = Template(
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
)

LLAMA3 = Template(
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

ALPACA = Template(
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endif %}"
    "{% endfor %}",
)

VICUNA = Template(
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}",
)

TEMPLATES: dict[str, Template] = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
}
