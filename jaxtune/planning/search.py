"""The fastest layout of a step: those that look best by the forecast are compiled and compared."""

from dataclasses import dataclass
from typing import Any

from jaxtune import hardware
from jaxtune.errors import ConfigError, DoesNotFitError
from jaxtune.hardware import GIB
from jaxtune.log import info
from jaxtune.planning.account import Estimate, Plan, plan
from jaxtune.planning.layouts import Layout, forecasts
from jaxtune.schema import RunConfig

SLACK = 1.3  # a layout is compiled although the forecast says that it needs so much of the memory


@dataclass(frozen=True)
class Found:
    """A layout that fits, and its plan."""

    flags: list[str]
    plan: Plan


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        considered: how many layouts there are for the global batch.
        too_large: flags of those that were compiled and do not fit.
        ranked: those that fit, the fastest by estimate first.
    """

    considered: int
    too_large: list[list[str]]
    ranked: list[Found]

    def table(self) -> str:
        """For people."""
        tried = len(self.ranked) + len(self.too_large)
        lines = [f"{self.considered} layouts, {tried} compiled, {len(self.ranked)} fit", ""]
        names = tuple(self.ranked[0].plan.mesh)
        heads = (*names, "remat", "micro-batch", "steps", "GiB", "est. ms", "tokens/s", "limit")
        rows = [heads, *(_row(found, names) for found in self.ranked)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        for row in rows:
            cells = (cell.rjust(n) for cell, n in zip(row, widths, strict=True))
            lines.append("  ".join(cells))
        best = " ".join(self.ranked[0].flags)
        return "\n".join([*lines, "", "Times are estimates, not measured. The best:", "", best])


def search(cfg: RunConfig, topology: str, devices: list[Any], compiles: int) -> Search:
    """Compares layouts of the config's global batch over the devices.

    Args:
        cfg: the config; its mesh and micro-batch say the global batch. Of model.remat only `auto`
            is searched.
        topology, devices: see `topology_devices`.
        compiles: how many layouts to compile at most.

    Raises:
        ConfigError: nothing is known of the devices' speed.
        DoesNotFitError: none of those compiled fits.
    """
    chip, limit = hardware.chip(devices[0].device_kind), hardware.memory_bytes(devices[0])
    if chip is None or limit is None:
        raise ConfigError(
            f"--search compares times, and the speed of {devices[0].device_kind} is unknown - "
            "name a TPU or an NVIDIA GPU"
        )
    waiting = forecasts(cfg, devices, chip)
    considered = len(waiting)
    waiting = [one for one in waiting if one.bytes <= SLACK * limit] or waiting[:compiles]
    info(f"{considered} layouts, {len(waiting)} may fit; compiling {min(compiles, len(waiting))}")
    ranked: list[Found] = []
    too_large: list[Layout] = []
    while waiting and len(ranked) + len(too_large) < compiles:
        layout = waiting.pop(0).layout
        found = _tried(layout.applied(cfg), topology, devices, " ".join(layout.flags()))
        if found is None:
            too_large.append(layout)
            waiting = [one for one in waiting if not one.layout.needs_no_less_than(layout)]
        else:
            ranked.append(Found(layout.flags(), found))
    if not ranked:
        raise DoesNotFitError(
            f"none of {len(too_large)} layouts compiled fits {topology} - raise --compiles, lower "
            "data.max_seq_len, set quant.format=nf4, or use more devices"
        )
    ranked.sort(key=lambda found: _estimate(found.plan).step_seconds)
    return Search(considered, [layout.flags() for layout in too_large], ranked)


def _tried(cfg: RunConfig, topology: str, devices: list[Any], flags: str) -> Plan | None:
    """The plan of a layout, said on the console; None: it does not fit."""
    try:
        found = plan(cfg, topology, devices)
    except DoesNotFitError as error:
        info(f"{flags}: {str(error).partition(' - ')[0]}")
        return None
    size = f"{found.total / GIB:.2f} GiB"
    if not found.fits:
        info(f"{flags}: {size}, too much")
        return None
    info(f"{flags}: {size}, about {_estimate(found).step_seconds * 1e3:,.0f} ms")
    return found


def _estimate(found: Plan) -> Estimate:
    assert found.estimate is not None, "of a device whose speed is known"
    return found.estimate


def _row(found: Found, names: tuple[str, ...]) -> tuple[str, ...]:
    p, e = found.plan, _estimate(found.plan)
    cells = [*(p.mesh[name] for name in names), p.remat, p.micro_batch_size]
    cells += [p.gradient_accumulation_steps, f"{p.total / GIB:.2f}", f"{e.step_seconds * 1e3:,.0f}"]
    return tuple(map(str, [*cells, f"{e.tokens_per_second:,.0f}", e.limited_by]))
