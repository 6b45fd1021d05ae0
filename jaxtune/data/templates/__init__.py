"""Built-in chat templates, for tokenizers that bring none (`data.template`).

A template is a file beside this one. It prints no BOS at its beginning: `tokenizer.load_tokenizer`
puts `{{ bos_token }}` before it exactly when the tokenizer itself starts plain text with BOS.
`tokens` are the texts that must each be one token of the vocabulary; a template whose markers would
fall to pieces is refused. Turns of tools are refused by templates that print none of them, because
their text is missing then.

Sources: the model cards and tokenizers of the families; vicuna, github.com/lm-sys/FastChat
(vicuna_v1.1); alpaca, github.com/tatsu-lab/stanford_alpaca.
"""

from pathlib import Path
from typing import NamedTuple

IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|user|>", "<|assistant|>")


class Template(NamedTuple):
    """The file of a chat template and the tokens that it needs."""

    file: str
    tokens: tuple[str, ...] = ()

    @property
    def jinja(self) -> str:
        """The text of the template."""
        return (Path(__file__).parent / f"{self.file}.jinja").read_text(encoding="utf-8")


TEMPLATES: dict[str, Template] = {
    "chatml": Template("chatml", IM),
    "alpaca": Template("alpaca"),
    "baichuan2": Template("baichuan2", ("<reserved_106>", "<reserved_107>")),
    "chatglm2": Template("chatglm2", ("[gMASK]", "sop")),
    "chatglm3": Template("chatglm3", ("[gMASK]", "sop", *ROLES)),
    "deepseek": Template("deepseek", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
    "gemma": Template("gemma", ("<start_of_turn>", "<end_of_turn>")),
    "glm4": Template("glm4", ("[gMASK]", "<sop>", *ROLES)),
    "internlm2": Template("chatml", IM),
    "llama2": Template("llama2"),
    "llama3": Template("llama3", HEADERS),
    "llama3.1": Template("llama3.1", HEADERS),
    "mistral": Template("mistral"),
    "mistral_v3": Template("mistral_v3", ("[INST]", "[/INST]")),
    "mistral_v7": Template(
        "mistral_v7", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "phi3": Template("phi3", (*ROLES, "<|end|>")),
    "phi4": Template("phi4", (*IM, "<|im_sep|>")),
    "qwen2.5": Template("qwen2.5", IM),
    "qwen3": Template("qwen3", IM),
    "vicuna": Template("vicuna"),
    "yi": Template("chatml", IM),
}
