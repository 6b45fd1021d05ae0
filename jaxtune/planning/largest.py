"""The longest rows, or the most of them, whose step fits the devices.

Memory grows almost evenly with both, so a line through the last two sizes says where to compile
next; the answer is a compiled size that fits, next to one that does not.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtune import hardware
from jaxtune.errors import ConfigError, DoesNotFitError
from jaxtune.fit import USABLE
from jaxtune.log import info
from jaxtune.planning.account import Plan, described, plan
from jaxtune.schema import RunConfig

MOST_ROWS = 1 << 16  # that are asked for
# Section, field and step of what can be made larger. Below 64 tokens kernels pad.
QUANTITIES = {"max_seq": ("data", "max_seq_len", 64), "max_batch": ("train", "micro_batch_size", 1)}


@dataclass(frozen=True)
class Largest:
    """The largest step that fits.

    Attributes:
        flags: for the command line.
        bounded_by: what keeps it from being larger.
        plan: of the step.
    """

    flags: list[str]
    bounded_by: str
    plan: Plan

    def table(self) -> str:
        """For people."""
        head = f"{'largest':15} {' '.join(self.flags)}\n{'bounded by':15} {self.bounded_by}"
        return f"{head}\n{self.plan.table()}"


def largest(cfg: RunConfig, topology: str, devices: list[Any], quantity: str) -> Largest:
    """Finds the largest max_seq_len or micro_batch_size that fits.

    With model.remat=auto the leanest policy is taken: with it the most fits.

    Args:
        cfg: the config; the value it has is where the search begins.
        topology, devices: see `topology_devices`.
        quantity: of `QUANTITIES`.

    Raises:
        DoesNotFitError: not even the smallest step fits.
        ConfigError: the config does not suit the devices.
    """
    section, field, step = QUANTITIES[quantity]
    if cfg.model.remat == "auto":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    most = _most(cfg, devices, quantity) // step

    def tried(size: int) -> Plan | None:
        part = dataclasses.replace(getattr(cfg, section), **{field: size * step})
        try:
            found = plan(dataclasses.replace(cfg, **{section: part}), topology, devices)
        except DoesNotFitError as error:
            info(f"{field}={size * step}: {str(error).partition(' - ')[0]}")
            return None
        kept = "fits" if found.fits else "too much"
        info(f"{field}={size * step}: {found.total / 2**30:.2f} GiB, {kept}")
        return found if found.fits else None

    if hardware.memory_bytes(devices[0]) is None:
        raise ConfigError(f"--fit: the memory of {devices[0].device_kind} is unknown")
    start = min(max(getattr(getattr(cfg, section), field) // step, 1), most)
    found = _search(tried, start, most)
    if found is None:
        raise DoesNotFitError(
            f"not even config.{section}.{field}={step} fits {topology} with remat {cfg.model.remat}"
            " - set quant.format=nf4, or use more devices"
        )
    size, best = found
    flags = [f"--config.{section}.{field}={size * step}", f"--config.model.remat={best.remat}"]
    bound = f"memory: {(size + 1) * step} does not fit"
    if size == most:
        bound = f"the model's positions or the schema: {size * step} is the most"
    return Largest(flags, bound, best)


def _most(cfg: RunConfig, devices: list[Any], quantity: str) -> int:
    """The largest value that is asked for: of tokens, what the model's positions allow."""
    if quantity == "max_batch":
        return MOST_ROWS
    high = type(cfg.data).__dataclass_fields__["max_seq_len"].metadata["high"]
    return min(high, described(cfg, devices).model_config.max_positions)


def _search(tried: Callable[[int], Plan | None], start: int, most: int) -> tuple[int, Plan] | None:
    """The largest size up to `most` that fits, and its plan; None if 1 does not."""
    fitting: dict[int, Plan] = {}
    low, high, size = 0, most + 1, start
    while high - low > 1:
        found = tried(size)
        if found is None:
            high = size
        else:
            low, fitting[size] = size, found
        size = _guess(fitting, low, high, most)
    return (low, fitting[low]) if low else None


def _guess(fitting: dict[int, Plan], low: int, high: int, most: int) -> int:
    """The size to try between one that fits (0: none yet) and one that does not or is too many."""
    if low == 0:
        return max(1, high // 2)
    best = fitting[low]
    smaller = max((size for size in fitting if size < low), default=None)
    if smaller is None:
        slope = best.temporaries / low
    else:
        slope = (best.total - fitting[smaller].total) / (low - smaller)
    free = USABLE * (best.limit or 0) - best.total
    guess = low + max(1, int(free / max(slope, 1.0)))
    if guess >= high:
        guess = most if high > most else (low + high) // 2
    return min(guess, 4 * low)
