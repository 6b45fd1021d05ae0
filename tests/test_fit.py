"""Which recomputation a run with model.remat=auto gets, for devices of a given size."""

import dataclasses

import jax
import optax
import pytest

from jaxtune import build, fit, hardware
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError
from jaxtune.schema import Data, Model, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh

RATE = optax.constant_schedule(0.1)
TX = optax.sgd(RATE)


def described(**model: str) -> build.Run:
    config = RunConfig(
        model=Model(**model),
        data=Data(train=("rows.jsonl",), max_seq_len=128),
        train=Train(micro_batch_size=8),
    )
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return build.describe(config, mesh, open_checkpoint("tiny:llama"))


def needed(run: build.Run) -> int:
    state = build.abstract_state(run, TX)
    compiled = fit._step(run, TX, RATE).lower(state, run.frozen, fit.abstract_batch(run)).compile()
    return fit.planned_bytes(compiled)


def chosen(monkeypatch: pytest.MonkeyPatch, limit: float | None) -> str:
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: limit)
    return fit.fitted_step(described(), TX, RATE)[0].policy.remat


def test_the_first_policy_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch):
    most, least = needed(described(remat="none")), needed(described(remat="full"))
    assert least < most
    assert chosen(monkeypatch, most / fit.USABLE + 1) == "none"
    assert chosen(monkeypatch, most / fit.USABLE - 1) != "none"
    assert chosen(monkeypatch, None) == described().policy.remat


def test_a_policy_that_is_named_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 1)
    assert fit.fitted_step(described(remat="dots"), TX, RATE)[0].policy.remat == "dots"


def test_a_cpu_that_is_too_small_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(fit, "warn", said.append)
    assert chosen(monkeypatch, 1) == "full"
    assert "lower train.micro_batch_size" in said[0]


@pytest.mark.parametrize(
    ("option", "platform"), [("pallas_tpu", "tpu"), ("splash", "tpu"), ("pallas_gpu", "gpu")]
)
def test_a_kernel_of_another_platform_is_refused(option: str, platform: str):
    with pytest.raises(ConfigError, match=f"attention={option} runs on {platform} only"):
        described(attention=option)


def test_the_compiled_batch_is_the_largest():
    run = described()
    run = dataclasses.replace(
        run,
        config=dataclasses.replace(
            run.config, train=Train(micro_batch_size=3, gradient_accumulation_steps=2)
        ),
    )
    assert fit.abstract_batch(run).tokens.shape == (2, 3, 128)
