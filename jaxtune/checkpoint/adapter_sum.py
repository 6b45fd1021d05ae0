"""Several LoRAs of one base as one: the weighted sum of what they add, exactly.

    sum_i w_i s_i A_i B_i = [A_1 A_2 ...] [w_1 s_1 B_1; w_2 s_2 B_2; ...]

The ranks add up. With all weights 1 the adapters are stacked: all of them act.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.checkpoint.adapter import Adapter
from jaxtune.errors import ConfigError
from jaxtune.peft import Adapters, lora


def summed(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter that adds what all of them add, each times its weight.

    Args:
        parts: LoRAs of one base, in any layers and with any ranks, and their weights.

    Raises:
        ConfigError: one of them is no plain LoRA.
    """
    for adapter, _ in parts:
        a = adapter.adapters
        if a.method != "lora" or a.config.lora_bias or a.saved or a.biases or a.rows:
            raise ConfigError(
                "only plain LoRAs can be added up: one of the adapters is another method's, or "
                "has biases, tokens or parts of the base beside it - use it alone"
            )
    params: dict[str, np.ndarray] = {}
    choice: dict[str, tuple[Any, ...]] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.adapters.choice):
        having = [(adapter, w) for adapter, w in parts if path in adapter.adapters.choice]
        name = f"{path}.adapter."
        a = np.concatenate([adapter.params[name + "a"] for adapter, _ in having], axis=-1)
        b = [adapter.params[name + "b"] * _scales(adapter, path, w) for adapter, w in having]
        params[name + "a"], params[name + "b"] = a, np.concatenate(b, axis=-2)
        layers = zip(*(adapter.adapters.choice[path] for adapter, _ in having), strict=True)
        config = lora.Config(rank=a.shape[-1], alpha=float(a.shape[-1]))
        choice[path] = tuple(config if any(layer) else None for layer in layers)
    first = next(config for configs in choice.values() for config in configs if config)
    warnings = tuple(dict.fromkeys(text for adapter, _ in parts for text in adapter.warnings))
    return Adapter(Adapters("lora", first, choice), params, warnings)


def _scales(adapter: Adapter, path: str, weight: float) -> np.ndarray:
    """Scale times weight of each layer, to multiply B [n, R, F], [n, E, R, F] or [R, F] with."""
    configs = adapter.adapters.choice[path]
    scales = np.array([weight * config.scale if config else 0.0 for config in configs], np.float32)
    return scales.reshape(-1, *[1] * (adapter.params[f"{path}.adapter.b"].ndim - 1))
