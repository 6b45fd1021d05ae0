"""Model families: one file each, found by the `model_type` of config.json."""

import importlib
from types import ModuleType
from typing import Any

from jaxtune.errors import WeightError

# Hugging Face model_type -> module in this folder.
FAMILIES = {"llama": "llama"}


def family(model_type: Any) -> ModuleType:
    """The module of a family; WeightError with the known names for an unknown one."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise WeightError(f"model_type {model_type!r} is not supported - supported: {known}")
    return importlib.import_module(f"jaxtune.models.{FAMILIES[model_type]}")
