"""Fine-tuning of large language models in JAX: Hugging Face weights in, Hugging Face files out.

load(path, ...)   a model for logits and generation (see docs/generate.md)
train(config)     a whole run; returns its final metrics and the paths it wrote
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]

# Resolved on first use, so that `import jaxtune.config` does not import jax.
_API = {"load": "jaxtune.infer", "train": "jaxtune.train"}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    function = getattr(importlib.import_module(_API[name]), name)
    globals()[name] = function  # importing jaxtune.train has put the module there
    return function
