"""Learning rates by step."""

import optax

from jaxtune.schema import Optim


def make_schedule(config: Optim, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, linear or cosine to the end.

    As in transformers' schedulers the first step has learning rate 0 when there is a warm-up, and
    decay ends at `num_steps`.
    """
    warmup = config.warmup_steps or round(config.warmup_ratio * num_steps)
    rest, peak = max(num_steps - warmup, 1), config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * config.min_lr_ratio, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.min_lr_ratio),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
