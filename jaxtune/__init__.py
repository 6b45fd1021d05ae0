"""Fine-tuning of large language models in JAX: Hugging Face weights in, Hugging Face files out.

load(path, ...)   a model for logits and generation (see docs/generate.md)
train(config)     a whole run; returns its final metrics and the paths it wrote
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.infer import load as load
    from jaxtune.train import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Resolves the API on first use, so that `import jaxtune.config` does not import jax."""
    if name == "load":
        return importlib.import_module("jaxtune.infer").load
    if name == "train":
        return importlib.import_module("jaxtune.train")
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
