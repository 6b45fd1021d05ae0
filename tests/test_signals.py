"""The first signal is a request, the second an order."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtune.signals import StopSignal

SCRIPT = """
import sys, time
from jaxtune.errors import run_command
from jaxtune.signals import StopSignal

def main():
    with StopSignal() as stop:
        print("ready", flush=True)
        if "deaf" in sys.argv:
            # As in a compilation: no bytecode of the main thread runs.
            import ctypes
            ctypes.CDLL(None).sleep(60), ctypes.CDLL(None).sleep(60)
        while stop.received is None:
            time.sleep(0.01)
        print("saving", flush=True)
        if "slow" in sys.argv:
            time.sleep(60)
        raise stop.error("stopped after step 3 - start the same command to go on")

run_command(main)
"""


def start(*options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 75), (signal.SIGINT, 130)))
def test_first_signal_stops_in_order(number: signal.Signals, code: int) -> None:
    with start() as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert out == "saving\n"
    assert process.returncode == code
    assert f"{number.name}: saving after this step" in err
    assert "jaxtune: error: stopped after step 3" in err and "Traceback" not in err


@pytest.mark.parametrize("option", ("slow", "deaf"))
@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_second_signal_ends_at_once(option: str, number: signal.Signals, code: int) -> None:
    with start(option) as process:
        process.send_signal(number)
        assert process.stderr is not None and number.name in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=10) == code


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while stop.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stop.received == signal.SIGTERM
    assert stop.error("x").exit_code == 75
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_other_threads_may_train() -> None:
    seen = []

    def train() -> None:
        with StopSignal() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [None]
