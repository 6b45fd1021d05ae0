"""Who is declared lost, with a stand-in for the coordination service."""

import time

import pytest

from jaxtune import distributed, peers, process
from jaxtune.errors import DataError, JaxtuneError, PeerError
from jaxtune.peers import FAILED, SIGNS, SILENT, Peers


class Service:
    """What JAX's client does with keys, for several processes of which one is this."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.barrier = False  # whether the others come to barriers

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in list(self.values.items()) if k.startswith(folder + "/")]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        if not self.barrier:
            raise RuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setattr(distributed, "client", lambda: found)
    monkeypatch.setattr(distributed, "leave", lambda: found.values.update(left="yes"))
    monkeypatch.setattr(peers, "on_abort", lambda last_words: None)
    monkeypatch.setattr(peers, "PERIOD_SECONDS", 0.02)
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.1)
    yield found
    process.set_place(0, 1)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[JaxtuneError]:
    """The errors with which the watch would have ended this process."""
    errors: list[JaxtuneError] = []

    monkeypatch.setattr(peers, "end_process", errors.append)
    return errors


def wait_for(errors: list[JaxtuneError]) -> str:
    deadline = time.monotonic() + 10
    while not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    (error,) = errors
    assert isinstance(error, PeerError) and error.exit_code == 71
    return str(error)


def test_silent_process_is_named_by_the_first(service: Service, ended):
    process.set_place(0, 3)
    service.values[f"{SIGNS}/2"] = "7 host-b pid 99"
    with Peers(0.2):
        text = wait_for(ended)
    assert text.startswith("process 2 has ended (on host-b pid 99, no sign of life for 0.2 s)")
    assert "the same command" in text
    assert service.values[f"{SILENT}/2"].startswith("on host-b")
    assert f"{SIGNS}/0" in service.values


def test_process_that_gives_signs_is_left_alone(service: Service, ended):
    process.set_place(0, 2)
    with Peers(0.2):
        for count in range(30):
            service.values[f"{SIGNS}/1"] = f"{count} host-b pid 99"
            time.sleep(0.02)
    assert not ended


def test_news_of_a_failure_end_a_process_after_a_while(service: Service, ended):
    process.set_place(1, 2)
    with Peers(10):
        service.values[f"{FAILED}/0"] = "DataError: rows.jsonl:3 is no JSON"
        began = time.monotonic()
        text = wait_for(ended)
    assert time.monotonic() - began > 0.1
    assert text.startswith("process 0 has ended (DataError: rows.jsonl:3 is no JSON)")


def test_failure_is_told_and_keeps_its_own_error(service: Service, ended):
    process.set_place(1, 2)
    with pytest.raises(DataError), Peers(10):
        raise DataError("rows.jsonl is missing")
    assert service.values[f"{FAILED}/1"] == "DataError: rows.jsonl is missing"
    assert "left" not in service.values and not ended


def test_processes_that_fail_alike_part_in_order(service: Service, ended):
    process.set_place(1, 2)
    service.barrier = True
    with pytest.raises(DataError), Peers(10):
        raise DataError("rows.jsonl is missing")
    assert service.values["left"] == "yes" and not ended


def test_unexpected_error_waits_for_the_news_of_a_lost_process(service: Service, ended):
    process.set_place(0, 2)
    service.values[f"{SIGNS}/1"] = "7 host-b pid 99"
    with pytest.raises(ValueError), Peers(0.1):
        time.sleep(0.05)
        raise ValueError("Gloo AllGather failed: Connection closed by peer")
    assert "process 1 has ended" in wait_for(ended)


def test_one_process_watches_nobody():
    with Peers(10) as alone:
        assert not alone._thread.is_alive()
