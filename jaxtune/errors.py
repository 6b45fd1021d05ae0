"""The errors a user can cause, each with the exit code that a script can test for.

A command wraps its body in `run_command`, which prints one line,
`jaxtune: error: what is wrong - how to fix it`, and exits; a traceback appears only with `--debug`
or for errors that are ours (exit code 1).
"""

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from jaxtune import process


class JaxtuneError(Exception):
    """Base of every error with a user-readable message; `exit_code` is the process's status."""

    exit_code = 1


class ConfigError(JaxtuneError):
    """A wrong command line, config key or value, or combination of them."""

    exit_code = 2


class DataError(JaxtuneError):
    """A data file that cannot be read, or rows that break its schema."""

    exit_code = 3


class WeightError(JaxtuneError):
    """Weights, tokenizer, adapter or checkpoint files that are missing, damaged or do not fit."""

    exit_code = 4


class NumericsError(JaxtuneError):
    """Training stopped because losses or gradients were not finite."""

    exit_code = 5


class DoesNotFitError(ConfigError):
    """The step needs more memory than a device has."""

    exit_code = 6


class HangError(JaxtuneError):
    """A step took longer than it may (distributed.step_timeout_seconds)."""

    exit_code = 70


class PeerError(JaxtuneError):
    """Another process of the run has ended; start all again to go on."""

    exit_code = 71


class StorageError(JaxtuneError):
    """The disk is full, read-only, or otherwise refused a write that matters."""

    exit_code = 74


class PreemptedError(JaxtuneError):
    """A signal stopped the run after its state was saved; start the same command to go on."""

    exit_code = 75


class LockedError(JaxtuneError):
    """Another run is using the output directory."""

    exit_code = 76


def listing(lines: Iterable[str], limit: int = 20) -> str:
    """Joins problems into an indented list, `limit` of them at most, with a count of the rest."""
    lines = list(lines)
    shown = [f"\n  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"\n  ... and {len(lines) - limit} more")
    return "".join(shown)


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for a misspelt name: " - did you mean X?", or nothing if no known one is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" - did you mean {close[0]}?" if close else ""


# What the disk answers when it is full, read-only, broken or not ours.
_DISK_ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM")


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's body and turns an error of the user's into one line and its exit code."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
    except JaxtuneError as error:
        _exit(error.exit_code, str(error), debug)
    except BrokenPipeError:
        os._exit(0)
    except KeyboardInterrupt:
        _exit(130, "interrupted", debug)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in _DISK_ERRORS:
            raise
        text = f"{error.filename or 'a file'}: {error.strerror} - make room or choose another place"
        _exit(StorageError.exit_code, text, debug)
    except Exception:
        if process.count() == 1:
            raise
        traceback.print_exc()
        os._exit(JaxtuneError.exit_code)  # the runtime's own exit would wait for the others


def end_process(error: JaxtuneError) -> NoReturn:
    """Says what is wrong and ends the process, from any thread."""
    _exit(error.exit_code, str(error), debug=False)


def _exit(code: int, text: str, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.write(f"jaxtune: error: {process.label()}{text}\n")
    sys.stderr.flush()
    # Not sys.exit: background threads (prefetch, async save) may be blocked on what just failed.
    os._exit(code)
