"""Training metrics: speed, padding and utilisation around what the step returns."""

import math
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from jaxtune import tree
from jaxtune.build import Run
from jaxtune.checkpoint import hf
from jaxtune.data import Batch
from jaxtune.errors import NumericsError
from jaxtune.hardware import peak_flops
from jaxtune.log import Log
from jaxtune.tree import Params

T = TypeVar("T")


def flops_per_token(run: Run, length: float) -> float:
    """Model FLOPs of one training token, recomputation not counted.

    Forward and the gradient of activations cost 2 FLOPs each per weight of a matrix product, the
    latter not below the first stack that trains; the gradient of a weight costs 2 more, for trained
    weights only. Of a mixture only the experts that a token goes to count. Attention over a causal
    row of `length` tokens sees half of it on average.
    """
    length = min(length, run.config.train.attention_group or length)
    c = run.model_config

    def depth(name: str) -> int:
        """The number of a parameter's stack; -1 before the layers, their count behind them."""
        stack, _ = hf.split_path(name)
        outside = -1 if name.startswith(("embed.", "prefix.")) else len(run.stacks)
        return outside if stack is None else stack

    def used(variables: Params) -> float:
        """Weights of matrices that a token meets."""
        matrices = {n: s for n, s in variables.items() if _is_matrix(n)}
        experts = tree.count({n: s for n, s in matrices.items() if ".experts." in n})
        idle = experts * (1 - c.moe.top_k / c.num_experts) if experts else 0
        return tree.count(matrices) - idle

    weights = used(run.variables) + (c.vocab_size * c.hidden_size if c.tie_embeddings else 0)
    first = min(map(depth, run.trainable))
    below = used({n: s for n, s in run.variables.items() if depth(n) < first})
    attention = (6 if c.causal else 12) * length * c.num_heads * c.head_dim * c.num_layers
    return 4 * weights - 2 * below + 2 * used(run.trainable) + attention


def _is_matrix(name: str) -> bool:
    if ".adapter." in name:
        return not name.startswith("embed.")
    return name.endswith((".kernel", ".router.weight"))


class Meter:
    """Turns the metrics of steps into rows of the log.

    Metrics of a step are read while the next one runs, so that the devices never wait for the host.

    Attributes:
        last: the newest row.
    """

    def __init__(self, run: Run, log: Log, mean_length: float):
        """`mean_length` is the mean number of tokens of an example, for counting attention."""
        devices = run.mesh.devices
        peak = peak_flops(devices.flat[0], run.policy.compute_dtype)
        self.last: dict[str, float] = {}
        self._log, self._every = log, run.config.log.every_steps
        self._max_bad_steps = run.config.train.max_bad_steps
        # A token meets the weights of the encoder or of the decoder, and which is not counted here.
        counts = not run.config.objective.is_paired
        self._peak = peak * devices.size if counts and peak is not None else None
        self._is_labelled = run.config.objective.is_labelled
        self._flops_per_token = flops_per_token(run, mean_length)
        self._waiting: tuple[int, dict[str, Any], int] | None = None
        self._clock, self._tokens, self._slots = time.monotonic(), 0.0, 0
        self._waited = 0.0

    def take(self, items: Iterator[T]) -> T:
        """The next item of the data; the time until it is there is reported as `data_wait`."""
        began = time.monotonic()
        item = next(items)
        self._waited += time.monotonic() - began
        return item

    def add(self, step: int, metrics: dict[str, Any], batch: Batch) -> None:
        """Takes a step's metrics, still being computed; reports those of the step before.

        `batch` is that of all processes.
        """
        self.flush()
        self._waiting = (step, metrics, batch.size)

    def flush(self) -> None:
        """Reports the metrics that wait, if any.

        Raises:
            NumericsError: too many steps in a row were not finite.
        """
        if self._waiting is None:
            return
        step, metrics, slots = self._waiting
        self._waiting = None
        row = {name: float(value) for name, value in metrics.items()}
        self._tokens += row.pop("tokens")
        self._slots += slots
        if row["skipped"]:
            self._log.say(f"step {step}: loss or gradient is not finite; the update was skipped")
        if step % self._every == 0 or row["skipped"]:
            self._write(step, row)
        if row["bad_steps"] >= self._max_bad_steps:
            raise NumericsError(
                f"{row['bad_steps']:.0f} steps in a row up to step {step} were not finite; each "
                "was skipped - lower optim.learning_rate or look at the data, then start the same "
                "command, which goes on from the newest checkpoint"
            )

    def restart_clock(self) -> None:
        """Leaves the time since the last row (an evaluation, a save) out of the speed."""
        self._clock, self._waited = time.monotonic(), 0.0

    def _write(self, step: int, row: dict[str, float]) -> None:
        now = time.monotonic()
        speed = self._tokens / (now - self._clock)
        if not self._is_labelled:
            row["perplexity"] = math.exp(min(row["loss"], 700.0))
        row["tokens_per_second"] = speed
        row["padding_ratio"] = 1 - self._tokens / self._slots
        row["data_wait"] = self._waited / (now - self._clock)
        if self._peak is not None:
            row["mfu"] = speed * self._flops_per_token / self._peak
        self._clock, self._tokens, self._slots, self._waited = now, 0.0, 0, 0.0
        self.last = row
        self._log.write(step, "train", row)
