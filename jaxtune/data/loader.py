"""Tokenized rows -> an endless, exactly resumable stream of batches.

The order of an epoch follows from (seed, epoch) alone, and the rows of its batches (the plan) from
that order and the lengths. A position in the stream is therefore a handful of numbers, and a batch
can be made anywhere without making those before it. Every process computes the same plan and builds
only its own share of each batch, so all processes always agree on the number of steps.

An epoch shows every example exactly once: its last batch is filled up with empty rows.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxtune.data.ahead import ahead
from jaxtune.data.batch import Batch, TokenRow
from jaxtune.data.dataset import Dataset
from jaxtune.data.lanes import Lanes
from jaxtune.data.packing import Plan, cut_row, make_plan, stack_rows
from jaxtune.data.pairs import longest, stack_pairs
from jaxtune.data.position import Position, check_position
from jaxtune.data.stream import Stream
from jaxtune.schema import Data

LENGTH_STEP = 64  # pad_to=longest rounds up to a multiple, to compile for few lengths


@dataclass
class Loader:
    """Batches of a dataset.

    Attributes:
        dataset: where the rows come from.
        cfg: the data section of the config.
        rows: rows of one forward pass over all processes, B.
        accumulation: forward passes of one optimizer step, A.
        seed: of the order.
        held: which of the B rows this process builds, ascending.
    """

    dataset: Dataset
    cfg: Data
    rows: int
    accumulation: int
    seed: int
    held: tuple[int, ...]
    _plan: tuple[int, Plan] | None = field(default=None, repr=False)

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps of so many epochs (the part of an epoch is rounded up)."""
        whole = int(num_epochs)
        steps = sum(self._steps_in(epoch) for epoch in range(whole))
        part = num_epochs - whole
        return steps + (math.ceil(part * self._steps_in(whole)) if part > 0 else 0)

    def batches(
        self, position: Position | None = None, place: Callable[[Batch], Any] = lambda b: b
    ) -> Generator[tuple[Any, Position], None, None]:
        """Yields, without end, a step's batch [A, held rows, T] and the position after it.

        Batches are prepared by a background thread, which ends when the iterator is closed.

        Args:
            position: where to go on, as an earlier iterator gave it; default: the beginning.
            place: what the thread does with a batch at last: brings it to the devices.

        Raises:
            DataError, WeightError: the position belongs to other data or another order.
        """
        start = self._position(0, 0) if position is None else self._checked(position)
        placed = ((place(batch), after) for batch, after in self._generate(start))
        return ahead(placed, self.cfg.prefetch)

    def whole(self, position: Position) -> Position:
        """The position for a checkpoint, which is the same in every process."""
        return position

    def one_pass(self) -> Iterator[Batch]:
        """Yields batches [held rows, T] of every row once, in the order of the first epoch."""
        plan = self._plan_of(0)
        for first in range(0, len(plan), self.rows):
            batch = self._build(plan, first, 1)
            yield jax.tree.map(lambda x: x[0], batch)

    def _checked(self, position: Position) -> Position:
        if not self.cfg.allow_change:
            check_position(position, self._position(0, 0))
        return position

    def _generate(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        epoch, first = position["epoch"], position["row"]
        count = self.rows * self.accumulation
        while True:
            plan = self._plan_of(epoch)
            while first < len(plan):
                batch = self._build(plan, first, self.accumulation)
                first += count
                done = first >= len(plan)
                yield batch, self._position(epoch + 1 if done else epoch, 0 if done else first)
            epoch, first = epoch + 1, 0

    def _position(self, epoch: int, row: int) -> Position:
        seen = epoch * len(self.dataset.rows) + (self._plan_of(epoch).seen(row) if row else 0)
        return {
            "tokenizer": self.dataset.tokenizer,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "epoch": epoch,
            "row": row,
            "samples": seen,
        }

    def _steps_in(self, epoch: int) -> int:
        return math.ceil(len(self._plan_of(epoch)) / (self.rows * self.accumulation))

    def _plan_of(self, epoch: int) -> Plan:
        """The rows of an epoch; the last plan is kept, since it is asked for again and again."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(epoch))
        return self._plan[1]

    def _make_plan(self, epoch: int) -> Plan:
        lengths = self.dataset.rows.lengths + self.dataset.rows.room
        order = list(range(len(lengths)))
        if self.cfg.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(order)).tolist()
        return make_plan(lengths, order, self.cfg)

    def _build(self, plan: Plan, first: int, accumulation: int) -> Batch:
        """The arrays [A, held rows, T] of this process's share of A * B rows of the plan."""
        count = accumulation * self.rows
        stack = self._stacker(plan.pieces[first : first + count])
        passes = []
        for start in range(first, first + count, self.rows):
            own = [
                cut_row(self.dataset.rows, plan, start + row, self.cfg.isolated)
                for row in self.held
            ]
            passes.append(stack(own))
        return jax.tree.map(lambda *parts: np.stack(parts), *passes)

    def _stacker(self, pieces: np.ndarray) -> Callable[[Sequence[Sequence[TokenRow]]], Batch]:
        """What makes arrays of rows, as long as all rows of a step need.

        Args:
            pieces: those of the plan, of the rows in all processes if they hold one example each.
        """
        cfg, table = self.cfg, self.dataset.rows
        varies = not cfg.packing and cfg.pad_to == "longest"
        if table.paired:
            most = cfg.max_seq_len, cfg.max_target_len
            needed = longest(table, pieces[:, 0].tolist()) if varies else most
            source, target = map(_rounded, needed, most)
            return functools.partial(
                stack_pairs,
                source_length=source,
                target_length=target,
                loss_weights=cfg.loss_weights,
            )
        length = _rounded(int(pieces[:, 2].max()), cfg.max_seq_len) if varies else cfg.max_seq_len
        return functools.partial(
            stack_rows,
            length=length,
            loss_weights=cfg.loss_weights,
            label_columns=table.label_columns,
        )


def _rounded(length: int, most: int) -> int:
    """The length that rows are padded to, at most so much."""
    return min(most, math.ceil(length / LENGTH_STEP) * LENGTH_STEP)


def make_loader(
    dataset: Dataset | Stream,
    cfg: Data,
    *,
    rows: int,
    accumulation: int = 1,
    seed: int = 0,
    held: tuple[int, ...] | None = None,
) -> Loader | Lanes:
    """Makes what gives batches: `num_steps`, `batches` and `whole`, whatever the data are.

    Args:
        dataset: tokenized rows, or a stream.
        cfg: the data section of the config.
        rows: rows B of one forward pass, over all processes.
        accumulation: forward passes A of one optimizer step.
        seed: of the order of rows.
        held: which of the B rows this process builds, ascending; None: all of them.
    """
    held = tuple(range(rows)) if held is None else held
    if isinstance(dataset, Stream):
        return Lanes(dataset, rows, accumulation, seed, held)
    return Loader(dataset, cfg, rows, accumulation, seed, held)
