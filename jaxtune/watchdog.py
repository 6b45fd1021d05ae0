"""Ends a process whose step takes too long, showing where every thread of it is."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Hashable

from jaxtune import process
from jaxtune.errors import HangError, end_process

# How long the others have to hear of it; process 0 ends last, because JAX then ends the rest.
_FIRST_SECONDS, _OTHER_SECONDS = 5.0, 1.0


class Watchdog:
    """Times steps, from `start` to `stop`."""

    def __init__(self, seconds: float, tell: Callable[[Exception], None]):
        """`seconds` is what a step may take, 0: anything; `tell` lets other processes know."""
        self._seconds, self._tell = seconds, tell
        self._compiled: set[Hashable] = set()
        self._timer: threading.Timer | None = None

    def start(self, step: int, shape: Hashable) -> None:
        """A step begins; the first one of a shape is not timed, since it compiles."""
        self.stop()
        if self._seconds and shape in self._compiled:
            self._timer = threading.Timer(self._seconds, self._expire, [step])
            self._timer.daemon = True
            self._timer.start()
        self._compiled.add(shape)

    def stop(self) -> None:
        """The step is done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, step: int) -> None:
        sys.stderr.write(f"jaxtune: {process.label()}where every thread is:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(2)
        error = HangError(
            f"step {step} took longer than distributed.step_timeout_seconds={self._seconds} - "
            "see the stacks above; the same command goes on from the newest checkpoint"
        )
        if process.count() > 1:  # in a thread of its own, since the network may hang, too
            threading.Thread(target=self._tell, args=[error], daemon=True).start()
            time.sleep(_FIRST_SECONDS if process.is_first() else _OTHER_SECONDS)
        end_process(error)
