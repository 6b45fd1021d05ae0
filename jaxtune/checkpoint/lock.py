"""One run per output directory.

`run.lock` holds who is using the directory, and a kernel lock (flock) on it that ends with the
process, however it ends. The file stays after the run, emptied: deleting a lock file is a race, and
it marks the directory as ours. The kernel lock decides on one machine; between machines, where it
may not reach, the written record does, and a record left by another host is never taken over.
"""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from jaxtune.errors import ConfigError, LockedError, StorageError
from jaxtune.log import warn

NAME = "run.lock"


class RunLock:
    """Takes and holds an output directory; use it as a context manager.

    In a multi-process run only process 0 takes it.
    """

    def __init__(self, folder: str | Path):
        """Creates the directory if it is not there, checks that it can be written, and locks it.

        Raises:
            ConfigError: the path is a file, or a directory with content that is not of a run.
            StorageError: the directory cannot be created or written.
            LockedError: another run is using it.
        """
        self.folder = Path(folder)
        self._file: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _check_ours(self.folder)
            _probe(self.folder)
            descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"train.output_dir={folder}: a file is in the way - choose another directory"
            ) from error
        except OSError as error:
            raise StorageError(
                f"train.output_dir={folder} cannot be written: {error.strerror} - "
                "choose another directory or make this one writable"
            ) from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._file = descriptor

    def _take(self, descriptor: int) -> None:
        free = _flock(descriptor)
        holder = _read(descriptor)
        if not free or (holder and not _is_stale(holder)):
            known = holder or {"pid": "unknown", "host": "unknown"}
            advice = "wait for it or choose another directory"
            if free:
                advice = f"if that run is surely over, delete {self.folder / NAME}"
            raise LockedError(
                f"train.output_dir={self.folder} is in use by process {known['pid']} on host "
                f"{known['host']} - {advice}"
            )
        if holder:
            warn(
                f"took over {self.folder} from process {holder['pid']} on host {holder['host']}, "
                "which ended without releasing it"
            )
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot_id": _boot_id(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        try:
            _write(descriptor, json.dumps(record).encode())
        except OSError as error:
            raise StorageError(
                f"{self.folder / NAME} cannot be written: {error.strerror} - make room on the disk"
            ) from error

    def release(self) -> None:
        """Frees the directory; safe to call twice."""
        if self._file is not None:
            descriptor, self._file = self._file, None
            try:
                _write(descriptor, b"")
            except OSError:
                pass  # The record names a dead process: the next run takes it over.
            os.close(descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _check_ours(folder: Path) -> None:
    """Raises ConfigError for a directory whose visible content was not written by a run."""
    names = [path.name for path in folder.iterdir()]
    visible = [name for name in names if not name.startswith(".") and name != "lost+found"]
    if visible and NAME not in names and not _is_run_config(folder / "config.json"):
        raise ConfigError(
            f"train.output_dir={folder} holds files of something else ({sorted(visible)[0]}, ...) "
            "- choose a new or empty directory"
        )


def _is_run_config(path: Path) -> bool:
    """Whether it is a saved RunConfig (model folders have a config.json too)."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"train", "checkpoint"} <= config.keys()


def _probe(folder: Path) -> None:
    """Writes, flushes and deletes a file: orbax would find out in the background only."""
    path = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _flock(descriptor: int) -> bool:
    """Whether no other process holds the kernel lock; True where file systems have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
    return True


def _is_stale(holder: dict) -> bool:
    """Whether the recorded process, whose kernel lock is gone, has ended for certain."""
    boot_id = _boot_id()
    if holder["host"] != socket.gethostname():
        # Another container on this kernel, where only flock can tell; or another machine.
        return boot_id != "" and holder.get("boot_id") == boot_id
    if holder.get("boot_id") != boot_id:
        return True  # rebooted
    start = _process_start(holder["pid"])
    return start is None or start != holder.get("process_start")


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks after boot, which tells a reused pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self").exists() else _alive(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _alive(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _read(descriptor: int) -> dict | None:
    """The recorded holder; None if the lock was released, or its record was cut off."""
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        return holder if {"pid", "host"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


def _write(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    os.fsync(descriptor)
