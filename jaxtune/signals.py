"""SIGTERM and SIGINT ask a run to save and stop; the second one ends it at once.

Python runs signal handlers between bytecodes of the main thread, which may be inside a compilation
for minutes. The interpreter's C handler, however, writes the signal's number to a pipe immediately:
a thread reads it there and acts.
"""

import os
import signal
import sys
import threading
from types import FrameType

from jaxtune import process
from jaxtune.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Context manager that turns the first SIGTERM or SIGINT into a flag.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        received: the signal that asked to stop, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(self._read_end,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                # None stands for a handler of C code, which Python cannot put back.
                signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write_end)  # ends the thread
            self._previous = {}

    def error(self, message: str) -> PreemptedError:
        """The error to raise once the state is saved: exit code 75 after SIGTERM, 130 after ^C."""
        error = PreemptedError(message)
        if self.received == signal.SIGINT:
            error.exit_code = 130
        return error

    def _watch(self, read_end: int) -> None:
        while byte := os.read(read_end, 1):
            if byte[0] not in SIGNALS:
                continue
            if self.received is not None:
                os._exit(128 + byte[0])
            self.received = signal.Signals(byte[0])
            sys.stderr.write(
                f"jaxtune: {process.label()}{self.received.name}: saving after this step; "
                "once more ends at once\n"
            )
        os.close(read_end)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """A handler must exist for the interpreter to write to the pipe; the thread does the work."""
