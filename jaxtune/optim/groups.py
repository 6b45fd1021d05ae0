"""Which parameters an optimizer treats apart: kernels of layers, and what has its own rate."""

from collections.abc import Mapping

from jaxtune.errors import ConfigError
from jaxtune.schema import Optim


def is_kernel(names: tuple[str | None, ...]) -> bool:
    """Whether axes are those of a layer's matrix: two or more, and none counts tokens, scores or
    buckets of distances.

    Matrices of scores, of a head for labels or a router, are as the vocabulary's; a gate has one
    output.
    """
    return len(names) >= 2 and not {"vocab", "tokens", "scores", "gate", "buckets"} & set(names)


def rate_factors(config: Optim, axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, float]:
    """What the learning rate is multiplied with, of parameters for which that is not 1.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `loraplus_ratio` times as fast as A. As in
    PEFT 0.21.2's `create_loraplus_optimizer`, vectors count as B, and matrices of the
    embedding have a rate of their own.

    Args:
        config: numbers of the optimizer.
        axes: names of the trailing axes of each trained parameter.

    Raises:
        ConfigError: the embedding has a rate of its own, and does not train.
    """
    factors = {}
    embeds = any(name.startswith("embed.") and len(names) >= 2 for name, names in axes.items())
    if config.embedding_learning_rate is not None and not embeds:
        raise ConfigError(
            f"config.optim.embedding_learning_rate={config.embedding_learning_rate} would be "
            "ignored: no matrix of the embedding trains"
        )
    for name, names in axes.items():
        if name.startswith("embed.") and len(names) >= 2:
            if config.embedding_learning_rate is not None:
                factors[name] = config.embedding_learning_rate / config.learning_rate
        elif name.endswith(".adapter.b") or len(names) < 2:
            factors[name] = config.loraplus_ratio
    return {name: factor for name, factor in factors.items() if factor != 1.0}
