"""The account of a step: the very program that would train, compiled, and what it says.

Memory is the compiler's, work and traffic are read from the program's text, times are estimates
from the device's data sheet.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune import build, fit, hardware, optim, tree
from jaxtune.checkpoint.source import open_description
from jaxtune.hardware import GIB, Chip
from jaxtune.hlo.timeline import Reading, Work
from jaxtune.meter import flops_per_token
from jaxtune.schema import RunConfig
from jaxtune.sharding.mesh import make_mesh


@dataclass(frozen=True)
class Received:
    """What collectives of one kind bring to a device in a step, along axes of the mesh."""

    kind: str
    axes: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """Times of a step by the data sheet: not measured, and no promise.

    Attributes:
        compute_seconds: its FLOPs at the bfloat16 peak.
        memory_seconds: its traffic at the memory's bandwidth.
        network_seconds: what it receives, at the speed of the links.
        limited_by: the largest of these.
        step_seconds: of the program's schedule, see `hlo.timeline`; more than each of these.
        tokens_per_second: at that time, of all devices.
    """

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    limited_by: str
    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """What a step costs; bytes and FLOPs are of one device.

    Attributes:
        model, topology, device: names; `device` is JAX's device_kind.
        devices: how many.
        mesh: sizes of its axes.
        rows, length: of a step's batch, over all devices and micro-batches.
        micro_batch_size, gradient_accumulation_steps: how the rows are taken.
        remat: the policy, decided if it was auto.
        parameters, trained: counts.
        weights, adapters, optimizer: bytes of frozen and trained parameters and optimizer state.
        host: bytes of these that are in host memory.
        temporaries, results, code: bytes, by the compiler; results are those not donated.
        total: bytes on the device, all of these.
        limit: bytes that a device has; None: unknown.
        model_tflop: model FLOPs of a step, recomputation not counted, over all devices.
        peak_seconds: the time that these take at the devices' bfloat16 peak; None: unknown peak.
        flops: of the program's products, recomputation included.
        memory_traffic, host_traffic: bytes that it moves to and from its memory and its host's.
        received: bytes that collectives bring.
        estimate: times; None: the device is not in the table of `hardware`.
        unread_loops: loops of the program that are counted once because it does not say how often
            they run.
        compile_seconds: of all programs compiled.
    """

    model: str
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    rows: int
    length: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    remat: str
    parameters: int
    trained: int
    weights: int
    adapters: int
    optimizer: int
    host: int
    temporaries: int
    results: int
    code: int
    total: int
    limit: int | None
    model_tflop: float
    peak_seconds: float | None
    flops: float
    memory_traffic: int
    host_traffic: int
    received: list[Received]
    estimate: Estimate | None
    unread_loops: list[str]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits a device."""
        return fit.fits(self.total, self.limit)

    def table(self) -> str:
        """For people."""
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1)
        limit = "an unknown limit" if self.limit is None else f"{self.limit / GIB:.2f} GiB"
        steps = self.gradient_accumulation_steps
        times = f" in {steps} micro-batches" if steps > 1 else ""
        lines = {
            "model": f"{self.model}, {self.parameters:,} parameters, {self.trained:,} trained",
            "devices": f"{self.devices} x {self.device} ({self.topology}) {axes}".rstrip(),
            "step": f"{self.rows} x {self.length} tokens{times}, remat {self.remat}",
        }
        for name in ("weights", "adapters", "optimizer", "temporaries", "results", "code"):
            lines[name] = f"{getattr(self, name) / GIB:8.3f} GiB"
        if self.host:
            lines["in host memory"] = f"{self.host / GIB:8.3f} GiB of these"
        lines["a device"] = f"{self.total / GIB:8.3f} GiB of {limit}"
        work = f"{self.model_tflop:,.1f} TFLOP"
        if self.peak_seconds is not None:
            speed = self.rows * self.length / self.peak_seconds
            work += f", at least {self.peak_seconds * 1e3:,.1f} ms: {speed:,.0f} tokens/s at most"
        lines["model's work"] = work
        lines["program"] = "\n".join(self._program())
        if self.estimate is not None:
            e = self.estimate
            lines["roofline"] = (
                f"compute {e.compute_seconds * 1e3:,.1f} ms, memory {e.memory_seconds * 1e3:,.1f} "
                f"ms, network {e.network_seconds * 1e3:,.1f} ms: limited by {e.limited_by}"
            )
            lines["estimate"] = (
                f"{e.step_seconds * 1e3:,.0f} ms a step, {e.tokens_per_second:,.0f} tokens/s "
                "(not measured)"
            )
        lines["compiled in"] = f"{self.compile_seconds:.1f} s"
        return "\n".join(
            f"{name:15} {value}".replace("\n", "\n" + " " * 16) for name, value in lines.items()
        )

    def _program(self) -> list[str]:
        lines = [f"{self.flops / 1e12:,.2f} TFLOP, recomputation included"]
        lines.append(f"{self.memory_traffic / GIB:8.3f} GiB from and to memory")
        if self.host_traffic:
            lines.append(f"{self.host_traffic / GIB:8.3f} GiB from and to the host's memory")
        for one in self.received:
            if one.bytes >= 1e-3 * sum(other.bytes for other in self.received):
                size = f"{one.bytes / GIB:8.3f} GiB received"
                lines.append(f"{size}: {one.kind} of {one.dtype} over {one.axes}")
        if self.unread_loops:
            lines.append(f"counted once, trips unknown: {', '.join(self.unread_loops)}")
        return lines


def plan(cfg: RunConfig, topology: str, devices: list[Any]) -> Plan:
    """Compiles the step of a config for the devices and reads it.

    Raises:
        ConfigError: the config does not suit the devices.
        DoesNotFitError: no program fits them.
    """
    run = described(cfg, devices)
    schedule = optim.make_schedule(cfg.optim, cfg.train.num_steps or 1)
    tx = build.make_optimizer(run, schedule)
    start = time.monotonic()
    run, compiled = fit.compiled_step(run, tx, schedule)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    state = build.abstract_state(run, tx)
    parts = {
        "weights": run.frozen | run.in_turn,
        "adapters": run.trainable | run.taken,
        "optimizer": state.opt_state,
    }
    batch = fit.abstract_batch(run)
    accumulation, rows, _ = batch.tokens.shape
    tokens, length = batch.size, batch.size // (accumulation * rows)
    model_flops = flops_per_token(run, length) * tokens
    peak = hardware.peak_flops(devices[0], "bfloat16")
    mesh = dict(run.mesh.shape)
    chip = hardware.chip(devices[0].device_kind)
    reading = Reading(compiled.as_text(), mesh, chip)
    work = reading.work()
    return Plan(
        model=run.checkpoint.name,
        topology=topology,
        device=devices[0].device_kind,
        devices=len(devices),
        mesh=mesh,
        rows=accumulation * rows,
        length=length,
        micro_batch_size=cfg.train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        remat=run.policy.remat,
        parameters=tree.count(run.variables),
        trained=tree.count(run.trainable),
        **{name: shard_bytes(part) for name, part in parts.items()},
        host=memory.host_argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        total=fit.planned_bytes(compiled),
        limit=hardware.memory_bytes(devices[0]),
        model_tflop=model_flops / 1e12,
        peak_seconds=None if peak is None else model_flops / (peak * len(devices)),
        flops=work.flops,
        memory_traffic=round(work.memory_bytes),
        host_traffic=round(work.host_bytes),
        received=received(work),
        estimate=None if chip is None else estimate(work, chip, tokens),
        unread_loops=sorted(reading.unread_loops),
        compile_seconds=seconds,
    )


def described(cfg: RunConfig, devices: list[Any]) -> build.Run:
    """The run of a config on the devices; of its checkpoint only config.json is read."""
    mesh = make_mesh(cfg.mesh.axes(), devices)
    return build.describe(cfg, mesh, open_description(cfg.model.path, cfg.model.revision))


def estimate(work: Work, chip: Chip, tokens: int) -> Estimate:
    """Times of a device's work, in which `tokens` are trained by all devices."""
    times = {
        "compute": work.flops / chip.flops,
        "memory": work.memory_bytes / chip.bandwidth,
        "network": work.network_seconds,
    }
    return Estimate(
        **{f"{name}_seconds": seconds for name, seconds in times.items()},
        limited_by=max(times, key=times.__getitem__),
        step_seconds=work.seconds,
        tokens_per_second=tokens / work.seconds,
    )


def received(work: Work) -> list[Received]:
    """The collectives of a step, the largest first."""
    found = [Received(*key, bytes=round(size)) for key, size in work.received.items()]
    return sorted(found, key=lambda one: -one.bytes)


def shard_bytes(described: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(described)
    )
