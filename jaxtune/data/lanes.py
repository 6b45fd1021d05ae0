"""A stream -> batches, resumable exactly, each process reading only its own share.

Row b of every batch is fed by lane b, which reads units b, b + B, b + 2 B ... of the stream's
endless sequence, wherever the devices of row b are: batches do not depend on the number of
processes, and a process reads nothing for rows that it does not hold. A lane takes
`data.shuffle_units` units at a time, a window; it mixes and packs their rows, and shows them. Its
state is the number of the window, the next row in it, and what `concat` carried into it.
"""

import functools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import distributed
from jaxtune.data.ahead import ahead
from jaxtune.data.batch import TokenBatch, TokenRow
from jaxtune.data.packing import Plan, cut_row, make_plan, stack_rows
from jaxtune.data.position import Position, check_position
from jaxtune.data.stream import Stream
from jaxtune.errors import ConfigError, DataError


class LaneState(NamedTuple):
    """Where a lane goes on: `row` of window `window`, before whose rows `carry` belongs."""

    window: int = 0
    row: int = 0
    carry: tuple[TokenRow, ...] = ()


class Window(NamedTuple):
    """The mixed rows of some units, of whose plan the first `num_rows` are shown."""

    number: int
    carry: tuple[TokenRow, ...]
    examples: Sequence[TokenRow]
    plan: Plan
    num_rows: int


@dataclass(frozen=True, eq=False)
class Lanes:
    """Batches of a stream; make it with `make_loader`.

    Attributes:
        dataset: the stream.
        rows: rows of one forward pass over all processes, B.
        accumulation: forward passes of one optimizer step, A.
        seed: of the order.
        held: which of the B rows this process builds, ascending.
    """

    dataset: Stream
    rows: int
    accumulation: int
    seed: int
    held: tuple[int, ...]

    def num_steps(self, num_epochs: float) -> int:
        """Unknown: raises ConfigError."""
        raise ConfigError(
            f"data.streaming does not count rows, so {num_epochs} epochs have no number of steps - "
            "set train.num_steps"
        )

    def batches(
        self, position: Position | None = None, place: Callable[[TokenBatch], Any] = lambda b: b
    ) -> Generator[tuple[Any, Position], None, None]:
        """Yields, without end, a step's batch [A, held rows, T] and the position after it.

        Args:
            position: where to go on, as `whole` gave it; default: the beginning.
            place: what a background thread does with a batch at last.

        Raises:
            DataError, WeightError: the position belongs to other data or another order; and, while
                batches are made, as `dataset.load`.
        """
        states = {lane: LaneState() for lane in self.held}
        if position is not None:
            states = self._states(position)
        placed = ((place(batch), after) for batch, after in self._generate(states))
        return ahead(placed, self.dataset.cfg.prefetch)

    def whole(self, position: Position) -> Position:
        """The position for a checkpoint: plain JSON, with the lanes of all processes.

        All processes must call it together.
        """
        own = {str(lane): _to_json(state) for lane, state in position["lanes"].items()}
        parts = [json.loads(text) for text in distributed.exchange(json.dumps(own))]
        return position | {"lanes": functools.reduce(lambda a, b: a | b, parts)}

    def _states(self, position: Position) -> dict[int, LaneState]:
        cfg = self.dataset.cfg
        if not cfg.allow_change:
            check_position(position, self._position({}))
        lanes = position.get("lanes", {})
        if len(lanes) != self.rows:
            raise DataError(
                f"the run's stream was dealt to {len(lanes)} rows of a batch, not {self.rows} - "
                "restore train.micro_batch_size times the number of data and fsdp shards"
            )
        return {lane: _from_json(lanes[str(lane)]) for lane in self.held}

    def _position(self, states: dict[int, LaneState]) -> Position:
        return {
            "tokenizer": self.dataset.tokenizer,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "lanes": states,
        }

    def _generate(self, states: dict[int, LaneState]) -> Iterator[tuple[TokenBatch, Position]]:
        cfg = self.dataset.cfg
        with ExitStack() as stack:
            lanes = {n: stack.enter_context(closing(self._lane(n, s))) for n, s in states.items()}
            while True:
                shown: list[list[TokenRow]] = []
                for _ in range(self.accumulation):
                    for lane in self.held:
                        examples, states[lane] = next(lanes[lane])
                        shown.append(examples)
                batch = stack_rows(shown, cfg.max_seq_len, cfg.loss_weights)
                yield jax.tree.map(self._in_passes, batch), self._position(dict(states))

    def _in_passes(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.accumulation, len(self.held), -1)

    def _lane(
        self, lane: int, state: LaneState
    ) -> Generator[tuple[list[TokenRow], LaneState], None, None]:
        """The rows of a lane, and its state after each."""
        first = state.row
        depth = 1 if self.dataset.cfg.prefetch else 0
        with closing(ahead(self._windows(lane, state), depth)) as windows:
            for window in windows:
                for row in range(first, window.num_rows):
                    examples = cut_row(window.examples, window.plan, row, self.dataset.cfg.isolated)
                    yield examples, self._after(window, row)
                first = 0

    def _after(self, window: Window, row: int) -> LaneState:
        if row + 1 < window.num_rows:
            return LaneState(window.number, row + 1, window.carry)
        return LaneState(window.number + 1, 0, _tail(window))

    def _windows(self, lane: int, state: LaneState) -> Iterator[Window]:
        cfg, number, carry = self.dataset.cfg, state.window, state.carry
        empty = 0
        while True:
            turn = number * self.rows + lane
            table = self.dataset.read(turn * cfg.shuffle_units, cfg.shuffle_units, self.seed)
            order = np.arange(len(table))
            if cfg.shuffle:
                order = np.random.default_rng([self.seed, turn, len(table)]).permutation(order)
            examples = [*carry, *(table[i] for i in order.tolist())]
            lengths = np.array([len(example.tokens) for example in examples], np.int64)
            plan = make_plan(lengths, range(len(examples)), cfg)
            is_full = lengths.sum() % cfg.max_seq_len == 0
            window = Window(
                number,
                carry,
                examples,
                plan,
                len(plan) - int(cfg.cuts_examples and not is_full),
            )
            if window.num_rows:
                yield window
            empty = 0 if len(table) else empty + cfg.shuffle_units
            if empty > len(self.dataset.units):
                raise DataError("no unit of the stream has a usable row - check the files")
            number, carry = number + 1, _tail(window)


def _tail(window: Window) -> tuple[TokenRow, ...]:
    """What is carried into the next window: the row that is not shown because it is not full."""
    if window.num_rows == len(window.plan):
        return ()
    return tuple(cut_row(window.examples, window.plan, window.num_rows, isolated=True))


def _to_json(state: LaneState) -> dict[str, Any]:
    carry = [[row.tokens.tolist(), row.trained.astype(int).tolist()] for row in state.carry]
    return {"window": state.window, "row": state.row, "carry": carry}


def _from_json(state: dict[str, Any]) -> LaneState:
    carry = [
        TokenRow(np.array(tokens, np.int32), np.array(trained, bool))
        for tokens, trained in state["carry"]
    ]
    return LaneState(state["window"], state["row"], tuple(carry))
