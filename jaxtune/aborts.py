"""Last words when JAX aborts the process.

JAX's coordination service ends a process by `abort()`, from a thread of its own, when the others do
not come or process 0 is gone. Python's handlers run in the main thread, too late for that, and
JAX's callback for the loss ends in std::bad_cast (jaxlib 0.10.2); a C handler is in time.
"""

import ctypes
import os
import signal
from collections.abc import Callable

from jaxtune.errors import JaxtuneError, end_process

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []  # ctypes does not keep what C code still calls


def on_abort(last_words: Callable[[], JaxtuneError | None]) -> None:
    """From now on an abort ends the process with the error that is given then, if any."""

    @_Handler
    def handle(number: int) -> None:
        error = last_words()
        if error is not None:
            end_process(error)
        os._exit(128 + number)

    _installed.append(handle)
    ctypes.CDLL(None).signal(signal.SIGABRT, handle)
