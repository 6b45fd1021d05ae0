"""No process of a run outlives another: whoever is lost is named, and all others end.

Every process writes a sign of life to the coordination service each second and looks for news of
ended ones. Process 0 notes who has gone silent; a process that fails notes its own error.

The service lives in process 0. When that is gone JAX aborts the others at once, which is told
by `aborts`.
"""

import os
import shlex
import socket
import sys
import threading
import time
from types import TracebackType

from jax._src.distributed import global_state

from jaxtune import distributed, process
from jaxtune.aborts import on_abort
from jaxtune.errors import JaxtuneError, PeerError, end_process

SIGNS, SILENT, FAILED = "jaxtune/signs", "jaxtune/silent", "jaxtune/failed"
PERIOD_SECONDS = 1.0
# Time for processes that fail alike to end each with its own error, and for the news to reach all
# before process 0 takes the service with it.
GRACE_SECONDS = 3.0


class Peers:
    """Watches the other processes from a thread; a context manager around the run.

    With one process it does nothing.
    """

    def __init__(self, silence_seconds: float):
        self._silence_seconds = silence_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._signs = 0
        self._failed_at: float | None = None  # when the first failure of another was seen
        self._seen: dict[int, tuple[str, float]] = {}  # newest sign of each process, and when

    def __enter__(self) -> "Peers":
        if process.count() > 1:
            on_abort(_lost_service)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if process.count() == 1:
            return
        if error is not None and not isinstance(error, JaxtuneError):
            # Most likely what a lost process does to a collective; the watch then ends this one.
            time.sleep(self._silence_seconds + 2 * PERIOD_SECONDS + GRACE_SECONDS)
        if error is not None:
            self._end_together(error)
        self._over.set()
        self._thread.join()

    def tell(self, error: BaseException) -> None:
        """Lets the other processes know why this one ends; they end within seconds."""
        why = f"{type(error).__name__}: {error}"
        distributed.client().key_value_set(f"{FAILED}/{process.index()}", why, allow_overwrite=True)

    def _end_together(self, error: BaseException) -> None:
        """Tells the others; if all end now, they part in order, each with its own error."""
        try:
            self.tell(error)
            milliseconds = int(2 * GRACE_SECONDS * 1000)
            distributed.client().wait_at_barrier(f"{FAILED}/all", milliseconds)
        except Exception:  # nobody to tell, or not all end: the watches of the others act
            return
        self._over.set()
        distributed.leave()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            try:
                news = self._look()
            except Exception:  # the service is gone, and JAX about to abort
                continue
            if news is not None:
                if process.is_first():
                    time.sleep(GRACE_SECONDS)
                return end_process(lost(news))

    def _look(self) -> str | None:
        """Gives a sign of life; returns which process has ended, once that must end this one."""
        client = distributed.client()
        self._signs += 1
        sign = f"{self._signs} {socket.gethostname()} pid {os.getpid()}"
        client.key_value_set(f"{SIGNS}/{process.index()}", sign, allow_overwrite=True)
        if process.is_first():
            self._note_silent()
        silent = _numbered(client.key_value_dir_get(SILENT))
        failed = _numbered(client.key_value_dir_get(FAILED))
        if process.index() in failed or not silent | failed:
            return None  # all is well, or this process is ending by itself
        self._failed_at = self._failed_at or time.monotonic()
        if not silent and time.monotonic() - self._failed_at < GRACE_SECONDS:
            return None
        number, why = next(iter((silent | failed).items()))
        return f"process {number} has ended ({why})"

    def _note_silent(self) -> None:
        """In process 0: declares ended whose sign has not changed for too long."""
        client, now = distributed.client(), time.monotonic()
        for number, sign in _numbered(client.key_value_dir_get(SIGNS)).items():
            if self._seen.get(number, ("", 0.0))[0] != sign:
                self._seen[number] = (sign, now)
            elif now - self._seen[number][1] > self._silence_seconds:
                where = sign.partition(" ")[2]
                why = f"on {where}, no sign of life for {self._silence_seconds:g} s"
                client.key_value_set(f"{SILENT}/{number}", why, allow_overwrite=True)


def lost(what: str) -> PeerError:
    """The error of a process that ends because another has."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return PeerError(
        f"{what}, so this one ends too - start all again with the same command, which goes on "
        f"from the newest checkpoint: {command}"
    )


def _numbered(entries: list[tuple[str, str]]) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _lost_service() -> PeerError | None:
    """The error of an abort, if process 0 is gone."""
    host, _, port = str(global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return lost(f"process 0 on {host} has ended")
    return None
