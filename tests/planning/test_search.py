"""Which layouts are compiled, and how they are ranked, where times and memory are made up."""

import math
from typing import Any

import jax
import pytest

from jaxtune import hardware
from jaxtune.errors import ConfigError, DoesNotFitError
from jaxtune.hardware import Chip
from jaxtune.meter import flops_per_token
from jaxtune.planning import layouts, search
from jaxtune.planning.account import Plan, described
from jaxtune.schema import Data, Mesh, Model, RunConfig, Train
from tests.planning.plans import made_up

CHIP = Chip(1e12, 1 << 30, 1e11, 1e10)
CONFIG = RunConfig(
    model=Model(path="tiny:llama"),
    data=Data(train=("rows.jsonl",), max_seq_len=64),
    train=Train(micro_batch_size=2, gradient_accumulation_steps=3),
    mesh=Mesh(data=2, fsdp=-1),
)


def global_batch(layout: layouts.Layout) -> int:
    mesh = dict(layout.mesh)
    rows = layout.micro_batch_size * layout.gradient_accumulation_steps
    return rows * mesh["data"] * mesh["fsdp"]


def test_layouts_keep_the_devices_and_the_global_batch():
    found = [one.layout for one in layouts.forecasts(CONFIG, jax.devices()[:4], CHIP)]
    assert {global_batch(layout) for layout in found} == {4 * 2 * 3}
    assert {math.prod(size for _, size in layout.mesh) for layout in found} == {4}
    assert len(set(found)) == len(found) > 50
    tensor = {dict(layout.mesh)["tensor"] for layout in found}
    assert tensor == {1, 2}, "tiny:llama has two key heads"
    named = RunConfig(**(vars(CONFIG) | {"model": Model(path="tiny:llama", remat="dots")}))
    found = [one.layout for one in layouts.forecasts(named, jax.devices()[:4], CHIP)]
    assert {layout.remat for layout in found} == {"dots"}


def test_rows_of_the_expert_axis_are_of_the_global_batch_and_idle_experts_cost_nothing():
    changes = {"model": Model(path="tiny:mixtral"), "mesh": Mesh(data=1, fsdp=-1, expert=2)}
    mixture = RunConfig(**(vars(CONFIG) | changes))
    found = [one.layout for one in layouts.forecasts(mixture, jax.devices()[:4], CHIP)]
    assert {dict(layout.mesh)["expert"] for layout in found} == {2}
    assert {2 * global_batch(layout) for layout in found} == {4 * 2 * 3}
    run = described(mixture, jax.devices()[:4])
    used = dict.fromkeys(("frozen", "trainable"), 0.0)
    for kind in used:
        for name, leaf in getattr(run, kind).items():
            if name.endswith((".kernel", ".router.weight", ".adapter.a", ".adapter.b")):
                used[kind] += math.prod(leaf.shape) * (0.5 if ".experts." in name else 1)
    scales = sum(
        math.prod(x.shape) / (2 if ".experts." in n else 1)
        for n, x in run.frozen.items()
        if n.endswith(".scale") and ".adapter." in n
    )
    expected = 4 * (used["frozen"] + used["trainable"] + scales) + 2 * used["trainable"]
    assert flops_per_token(run, 0) == pytest.approx(expected)


def test_forecasts_know_what_costs():
    found = {one.layout: one for one in layouts.forecasts(CONFIG, jax.devices()[:4], CHIP)}

    def of(remat: str, micro: int, **mesh: int) -> layouts.Forecast:
        axes = tuple((CONFIG.mesh.axes() | {"data": 1, "fsdp": 1, "tensor": 1} | mesh).items())
        shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
        return found[layouts.Layout(axes, remat, micro, 24 // shards // micro)]

    assert of("full", 6, fsdp=4).bytes < of("dots", 6, fsdp=4).bytes < of("none", 6, fsdp=4).bytes
    assert of("full", 6, fsdp=4).seconds > of("dots", 6, fsdp=4).seconds
    assert of("full", 1, fsdp=4).bytes < of("full", 6, fsdp=4).bytes < of("full", 6, data=4).bytes
    assert of("full", 1, fsdp=4).seconds > of("full", 6, fsdp=4).seconds


def searched(
    monkeypatch: pytest.MonkeyPatch, compiles: int, fits: Any, seconds: Any
) -> tuple[search.Search, list[RunConfig]]:
    tried = []

    def plan(cfg: RunConfig, topology: str, devices: list[Any]) -> Plan:
        tried.append(cfg)
        total = 10 if fits(cfg) else 1000
        return made_up(cfg, total=total, limit=100, seconds=seconds(cfg))

    monkeypatch.setattr(search, "plan", plan)
    monkeypatch.setattr(hardware, "chip", lambda kind: CHIP)
    return search.search(CONFIG, "none", jax.devices()[:4], compiles), tried


def test_the_fastest_that_fits_is_first(monkeypatch: pytest.MonkeyPatch):
    found, tried = searched(
        monkeypatch,
        12,
        lambda cfg: cfg.model.remat in ("dots", "full"),
        lambda cfg: 1.0 / cfg.train.micro_batch_size,
    )
    assert len(tried) == 12 == len(found.ranked) + len(found.too_large)
    assert found.considered > 50 and found.ranked and found.too_large
    times = [one.plan.estimate.step_seconds for one in found.ranked if one.plan.estimate]
    assert times == sorted(times)
    text = found.table()
    assert text.endswith(" ".join(found.ranked[0].flags)) and "not measured" in text
    assert f"{found.considered} layouts, 12 compiled, {len(found.ranked)} fit" in text


def test_what_needs_no_less_than_a_failure_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    _, tried = searched(monkeypatch, 30, lambda cfg: cfg.mesh.fsdp == 4, lambda cfg: 1.0)
    failed = [layout_of(cfg) for cfg in tried if cfg.mesh.fsdp != 4]
    for i, layout in enumerate(failed):
        assert not any(layout.needs_no_less_than(earlier) for earlier in failed[:i])


def layout_of(cfg: RunConfig) -> layouts.Layout:
    train = cfg.train
    axes = tuple(cfg.mesh.axes().items())
    steps = train.gradient_accumulation_steps
    return layouts.Layout(axes, cfg.model.remat, train.micro_batch_size, steps)


def test_what_cannot_be_answered(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="the speed of cpu is unknown"):
        search.search(CONFIG, "none", jax.devices()[:4], 2)
    with pytest.raises(DoesNotFitError, match="none of 2 layouts compiled fits"):
        searched(monkeypatch, 2, lambda cfg: False, lambda cfg: 1.0)
