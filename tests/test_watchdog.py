import time

import pytest

from jaxtune import watchdog
from jaxtune.errors import HangError, JaxtuneError
from jaxtune.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[JaxtuneError]:
    errors: list[JaxtuneError] = []
    monkeypatch.setattr(watchdog, "end_process", errors.append)
    return errors


def test_long_step_ends_the_process_with_stacks(ended, capfd: pytest.CaptureFixture[str]):
    told = []
    watch = Watchdog(0.1, told.append)
    watch.start(1, "shape")
    watch.start(2, "shape")
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    (error,) = ended
    assert isinstance(error, HangError) and error.exit_code == 70
    assert str(error).startswith("step 2 took longer than distributed.step_timeout_seconds=0.1")
    assert not told, "there is only one process"
    assert "test_watchdog.py" in capfd.readouterr().err


def test_what_compiles_and_what_is_done_is_not_timed(ended):
    watch = Watchdog(0.05, print)
    watch.start(1, (1, 8))
    time.sleep(0.1)
    watch.start(2, (1, 16))
    time.sleep(0.1)
    watch.start(3, (1, 8))
    watch.stop()
    time.sleep(0.1)
    assert not ended


def test_off():
    watch = Watchdog(0, print)
    watch.start(1, "shape")
    watch.start(2, "shape")
    assert watch._timer is None
