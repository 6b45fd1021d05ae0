"""Layouts of a step over the devices, and a cheap forecast of what each costs.

A layout is a mesh, a policy of recomputation and a micro-batch; the global batch stays what the
config says. The forecast counts FLOPs, weights that travel and activations that are kept; it only
chooses what is worth compiling, so it need not be right, but cheap.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxtune import build, fit, meter
from jaxtune.errors import ConfigError
from jaxtune.hardware import Chip
from jaxtune.nn.stack import REMAT
from jaxtune.planning.account import described, shard_bytes
from jaxtune.schema import RunConfig
from jaxtune.sharding.rules import GATHERED, RULES, batch_shards

AXES = ("data", "fsdp", "tensor")  # what is searched; other axes stay as the config says
# What a policy keeps of a layer, in outputs of its linear layers and attention (measured on TPU
# programs of Llama-3.1-8B: 1, 1, 2 to 3.5 and 2 to 3.5), and what it computes again of the forward.
_KEPT = {"full": 0.0, "offload": 0.0, "dots": 1.0, "attention": 3.0, "none": 3.0}
_AGAIN = {"full": 1.0, "offload": 0.05, "dots": 0.05, "attention": 0.02, "none": 0.0}


@dataclass(frozen=True)
class Layout:
    """How a step is laid out.

    Attributes:
        mesh: names and sizes of its axes.
        remat: what the backward pass recomputes.
        micro_batch_size, gradient_accumulation_steps: how a data shard takes its rows.
    """

    mesh: tuple[tuple[str, int], ...]
    remat: str
    micro_batch_size: int
    gradient_accumulation_steps: int

    def flags(self) -> list[str]:
        """For the command line."""
        flags = [f"--config.mesh.{name}={size}" for name, size in self.mesh if name in AXES]
        flags.append(f"--config.model.remat={self.remat}")
        steps = self.gradient_accumulation_steps
        flags.append(f"--config.train.micro_batch_size={self.micro_batch_size}")
        return [*flags, f"--config.train.gradient_accumulation_steps={steps}"]

    def applied(self, cfg: RunConfig) -> RunConfig:
        """The config with this layout."""
        return dataclasses.replace(
            cfg,
            mesh=dataclasses.replace(cfg.mesh, **dict(self.mesh)),
            model=dataclasses.replace(cfg.model, remat=self.remat),
            train=dataclasses.replace(
                cfg.train,
                micro_batch_size=self.micro_batch_size,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
            ),
        )

    def needs_no_less_than(self, other: "Layout") -> bool:
        """Whether it surely takes as much memory: same mesh, no smaller and no leaner."""
        leaner = REMAT.index(self.remat) <= REMAT.index(other.remat)
        return (
            self.mesh == other.mesh and leaner and self.micro_batch_size >= other.micro_batch_size
        )


@dataclass(frozen=True)
class Forecast:
    """Of a layout: bytes on a device, and seconds of a step."""

    layout: Layout
    bytes: float
    seconds: float


def forecasts(cfg: RunConfig, devices: list[Any], chip: Chip) -> list[Forecast]:
    """A forecast of every layout that the devices and the global batch allow, fastest first."""
    run = described(cfg, devices)
    shape = dict(run.mesh.shape)
    batch = cfg.train.micro_batch_size * cfg.train.gradient_accumulation_steps
    rows = batch * batch_shards(run.mesh)
    found = []
    for mesh in _meshes(shape, run.model_config):
        shards = math.prod(mesh[axis] for axis in RULES["batch"])
        if rows % shards:  # the global batch would change
            continue
        axes, each = tuple(mesh.items()), rows // shards
        try:
            at = described(Layout(axes, "full", each, 1).applied(cfg), devices)
        except ConfigError:  # the mesh does not suit the model or another option
            continue
        policies = fit.policies(at) if cfg.model.remat == "auto" else [cfg.model.remat]
        for micro in (n for n in range(mesh["stage"], each + 1, mesh["stage"]) if each % n == 0):
            layouts = (Layout(axes, remat, micro, each // micro) for remat in policies)
            found += [_forecast(at, layout, chip) for layout in layouts]
    return sorted(found, key=lambda one: one.seconds)


def _meshes(shape: dict[str, int], model: Any) -> Iterator[dict[str, int]]:
    """Meshes of the same devices; `tensor` divides the heads and the MLP."""
    count = math.prod(shape[name] for name in AXES)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        tensor = count // (data * fsdp)
        if data * fsdp * tensor != count:
            continue
        hidden = model.moe.expert_size if model.moe else model.intermediate_size
        if model.num_kv_heads % tensor == 0 and hidden % tensor == 0:
            yield shape | {"data": data, "fsdp": fsdp, "tensor": tensor}


def _forecast(run: build.Run, layout: Layout, chip: Chip) -> Forecast:
    """By the shapes of a run on the layout's mesh."""
    c, mesh, again = run.model_config, dict(layout.mesh), _AGAIN[layout.remat]
    tensor, gathered = mesh["tensor"], math.prod(mesh[axis] for axis in GATHERED)
    layers = c.num_layers / mesh["stage"]
    steps, length = layout.gradient_accumulation_steps, run.config.data.max_seq_len
    tokens = layout.micro_batch_size * length // mesh["sequence"]
    size = jnp.dtype(run.policy.compute_dtype).itemsize
    weights, trained = shard_bytes(run.frozen | run.in_turn), shard_bytes(run.trainable)
    whole = weights * gathered  # of a tensor shard
    hidden = c.moe.hidden_size if c.moe else c.intermediate_size
    outputs = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 2 * hidden
    layer = tokens * size * (outputs / tensor + 2 * c.hidden_size)
    residuals = tokens * size * c.hidden_size * layers

    state = weights + 4 * trained  # with gradients and two moments
    kept = residuals + _KEPT[layout.remat] * layer * layers
    head = size * c.vocab_size * c.hidden_size / tensor
    temporary = 3.5 * layer + 2 * whole / layers + head

    forward = 0.5 if run.adapters is not None else 1 / 3
    share = meter.flops_per_token(run, length) / (tensor * mesh["stage"])
    flops = steps * tokens * share * (1 + forward * again)
    moved = steps * (3 * whole + (6 + 2 * again) * layer * layers)
    gathers = 2 * steps * whole * (gathered - 1) / gathered
    sums = steps * (4 + 2 * again) * residuals * 2 * (tensor - 1) / tensor
    gradients = 2 * trained * gathered
    seconds = max(
        flops / chip.flops + moved / chip.bandwidth,
        (gathers + sums + gradients) / _network(chip, run),
    )
    return Forecast(layout, state + kept + temporary, seconds)


def _network(chip: Chip, run: build.Run) -> float:
    """Bytes/s between devices: of the slower network if they are of several hosts."""
    several = chip.host_devices is not None and run.mesh.size > chip.host_devices
    return chip.between_hosts if several and chip.between_hosts is not None else chip.network
