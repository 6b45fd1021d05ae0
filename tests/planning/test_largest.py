"""The largest step that fits, where memory is made up."""

from typing import Any

import jax
import pytest

from jaxtune import hardware
from jaxtune.errors import ConfigError, DoesNotFitError
from jaxtune.planning import largest
from jaxtune.planning.account import Plan
from jaxtune.schema import Data, Model, RunConfig, Train
from tests.planning.plans import made_up

LIMIT = 100_000


def config(length: int = 64, rows: int = 1) -> RunConfig:
    return RunConfig(
        model=Model(path="tiny:llama"),
        data=Data(train=("rows.jsonl",), max_seq_len=length),
        train=Train(micro_batch_size=rows),
    )


def run(
    monkeypatch: pytest.MonkeyPatch, cfg: RunConfig, quantity: str, bytes_of: Any
) -> tuple[largest.Largest, list[int]]:
    """What is found, and the sizes that were compiled for it."""
    tried = []

    def plan(cfg: RunConfig, topology: str, devices: list[Any]) -> Plan:
        size = cfg.data.max_seq_len if quantity == "max_seq" else cfg.train.micro_batch_size
        tried.append(size)
        if bytes_of(size) > 2 * LIMIT:
            raise DoesNotFitError("the compiler says so - use less")
        return made_up(cfg, total=bytes_of(size), limit=LIMIT)

    monkeypatch.setattr(largest, "plan", plan)
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: LIMIT)
    return largest.largest(cfg, "none", jax.devices()[:1], quantity), tried


@pytest.mark.parametrize("start", [1, 7, 300])
@pytest.mark.parametrize(
    "bytes_of",
    [lambda n: 500 * n, lambda n: 30_000 + 300 * n, lambda n: 20_000 + n * n, lambda n: 60_000],
    ids=["even", "offset", "square", "flat"],
)
def test_the_next_one_does_not_fit(monkeypatch: pytest.MonkeyPatch, start: int, bytes_of: Any):
    found, tried = run(monkeypatch, config(rows=start), "max_batch", bytes_of)
    size = found.plan.micro_batch_size
    if size < largest.MOST_ROWS:
        assert bytes_of(size) <= 0.95 * LIMIT < bytes_of(size + 1)
        assert {size, size + 1} <= set(tried) and f"{size + 1} does not fit" in found.bounded_by
    else:
        assert bytes_of(size) == 60_000
    assert len(set(tried)) == len(tried) <= 12
    assert found.flags == [f"--config.train.micro_batch_size={size}", "--config.model.remat=full"]
    assert found.flags[0] in found.table()


def test_rows_are_no_longer_than_the_models_positions(monkeypatch: pytest.MonkeyPatch):
    found, _ = run(monkeypatch, config(), "max_seq", lambda n: 10 * n)
    assert found.plan.length == 512 and "positions" in found.bounded_by
    found, _ = run(monkeypatch, config(), "max_seq", lambda n: 300 * n)
    assert found.plan.length == 256 and found.bounded_by == "memory: 320 does not fit"


def test_what_cannot_be_answered(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DoesNotFitError, match=r"not even config.train.micro_batch_size=1 fits"):
        run(monkeypatch, config(rows=9), "max_batch", lambda n: 99_000 + n)
    with pytest.raises(ConfigError, match="memory of cpu is unknown"):
        monkeypatch.setattr(hardware, "memory_bytes", lambda device: None)
        largest.largest(config(), "none", jax.devices()[:1], "max_batch")
