"""Model families: one file each, found by the `model_type` of config.json."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxtune.errors import WeightError
from jaxtune.models import heads

# Hugging Face model_type -> module in this folder.
FAMILIES = {
    "baichuan": "baichuan",
    "bert": "bert",
    "bloom": "bloom",
    "chatglm": "chatglm",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "electra": "electra",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "internlm": "internlm",
    "internlm2": "internlm2",
    "internlm3": "internlm3",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mt5": "mt5",
    "olmo2": "olmo2",
    "opt": "opt",
    "phi3": "phi3",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "roberta": "roberta",
    "stablelm": "stablelm",
    "t5": "t5",
}


def family(model_type: Any) -> ModuleType:
    """The module of a family; WeightError with the known names for an unknown one."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise WeightError(f"model_type {model_type!r} is not supported - supported: {known}")
    return importlib.import_module(f"jaxtune.models.{FAMILIES[model_type]}")


def sized(model_type: str, size: str) -> dict[str, Any]:
    """The config.json of a size that a family knows by name; WeightError for another one."""
    sizes = family(model_type).SIZES
    if size not in sizes:
        raise WeightError(
            f"{model_type}:{size}: no such size - known: "
            + ", ".join(f"{model_type}:{name}" for name in sizes)
        )
    return {**sizes[size]}


def read_config(hf: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The family and its config, from a model's config.json.

    Returns:
        The family's module, or what stands for it where the model has a head for labels
        (`heads.Headed`), and the config.

    Raises:
        WeightError: the family is unknown, or the file lacks a field that it needs.
        ConfigError: the family has no head for such labels.
    """
    module = family(hf.get("model_type"))
    try:
        config = module.Config.from_hf(hf)
    except KeyError as error:
        raise WeightError(f"{name}: config.json has no {error} - is it complete?") from error
    head = heads.head_of(hf)
    return (module, config) if head is None else heads.headed(module, config, head)
