"""`python -m jaxtune.plan`: the step that a config would train, compiled for devices not at hand.

    python -m jaxtune.plan --config=configs/lora_llama.py --topology=v5e:4x4
    python -m jaxtune.plan --config=configs/lora_llama.py --topology=cpu:8 --json

Everything up to the weights is `jaxtune.train`'s own: the config is checked, the run described,
`model.remat=auto` decided by compiling. Nothing is read but config.json; a size such as
`--config.model.path=llama:8b` needs no files at all. Memory is the compiler's account for one
device. Exit code 0: the step fits; 6: it does not.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune import build, config, fit, hardware, optim, tree
from jaxtune.checkpoint.source import open_description
from jaxtune.errors import ConfigError, run_command
from jaxtune.log import info
from jaxtune.schema import RunConfig
from jaxtune.sharding.mesh import make_mesh

GIB = 2**30

# libtpu asks the machine about its TPUs before it compiles, unless it is told not to.
_DEVICELESS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The smallest slice that libtpu describes. Not v4, of which it describes cores instead of chips.
_HOSTS = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}


@dataclass(frozen=True)
class Plan:
    """What a step costs; bytes are of one device.

    Attributes:
        model, topology, device: names; `device` is JAX's device_kind.
        devices: how many.
        mesh: sizes of its axes.
        rows, length: of a step's batch, over all devices and micro-batches.
        remat: the policy, decided if it was auto.
        parameters, trained: counts.
        weights, adapters, optimizer: bytes of frozen and trained parameters and optimizer state.
        host: bytes of these that are in host memory.
        temporaries, results, code: bytes, by the compiler; results are those not donated.
        total: bytes on the device, all of these.
        limit: bytes that a device has; None: unknown.
        model_tflop: model FLOPs of a step, recomputation not counted, over all devices.
        peak_seconds: the time that these take at the devices' bfloat16 peak; None: unknown peak.
        compile_seconds: of all programs compiled.
    """

    model: str
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    rows: int
    length: int
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
    compile_seconds: float

    def table(self) -> str:
        """For people."""
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1)
        limit = "an unknown limit" if self.limit is None else f"{self.limit / GIB:.2f} GiB"
        lines = {
            "model": f"{self.model}, {self.parameters:,} parameters, {self.trained:,} trained",
            "devices": f"{self.devices} x {self.device} ({self.topology}) {axes}".rstrip(),
            "step": f"{self.rows} x {self.length} tokens, remat {self.remat}",
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
        lines["compiled in"] = f"{self.compile_seconds:.1f} s"
        return "\n".join(f"{name:15} {value}" for name, value in lines.items())


def topology_devices(name: str) -> list[Any]:
    """Devices to compile for: `v5e:4x4` TPUs, through libtpu alone, or `cpu:8`.

    Call it before JAX has made its first array.

    Raises:
        ConfigError: an unknown name, or libtpu is missing or refuses.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices()
    if kind not in _HOSTS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ConfigError(
            f"--topology={name}: must be {', '.join(_HOSTS)} with a shape (v5e:4x4), or cpu:COUNT"
        )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.update(_DEVICELESS)
    count = math.prod(map(int, shape.split("x")))
    whole = f"{kind}:{shape if count >= 4 else _HOSTS[kind]}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=whole)
        return found.devices[: count if count < 4 else None]
    except ImportError as error:
        raise ConfigError(f"--topology={name} needs libtpu: pip install jaxtune[tpu]") from error
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--topology={name}: libtpu says: {first}") from error


def plan(cfg: RunConfig, topology: str, devices: list[Any]) -> Plan:
    """Compiles the step of a config for the devices.

    Raises:
        ConfigError: the config does not suit the devices.
        DoesNotFitError: no program fits them.
    """
    mesh = make_mesh(cfg.mesh.axes(), devices)
    run = build.describe(cfg, mesh, open_description(cfg.model.path, cfg.model.revision))
    schedule = optim.make_schedule(cfg.optim, cfg.train.num_steps or 1)
    tx = optim.make_optimizer(cfg.optim, schedule, build.trained_axes(run))
    start = time.monotonic()
    run, compiled = fit.compiled_step(run, tx, schedule)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    state = build.abstract_state(run, tx)
    parts = {"weights": run.frozen, "adapters": run.trainable, "optimizer": state.opt_state}
    accumulation, rows, length = fit.abstract_batch(run).tokens.shape
    work = run.flops_per_token(length) * accumulation * rows * length
    peak = hardware.peak_flops(devices[0], "bfloat16")
    return Plan(
        model=run.checkpoint.name,
        topology=topology,
        device=devices[0].device_kind,
        devices=len(devices),
        mesh=dict(mesh.shape),
        rows=accumulation * rows,
        length=length,
        remat=run.policy.remat,
        parameters=tree.count(run.frozen) + tree.count(run.trainable),
        trained=tree.count(run.trainable),
        **{name: shard_bytes(part) for name, part in parts.items()},
        host=memory.host_argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        total=fit.planned_bytes(compiled),
        limit=hardware.memory_bytes(devices[0]),
        model_tflop=work / 1e12,
        peak_seconds=None if peak is None else work / (peak * len(devices)),
        compile_seconds=seconds,
    )


def shard_bytes(described: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(described)
    )


def main() -> None:
    """Reads the command line, prints the plan."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        info((__doc__ or "") + "\n" + config.usage("jaxtune.plan --topology=NAME [--json]"))
        return
    named = [a.partition("=")[2] for a in arguments if a.startswith("--topology=")]
    if len(named) != 1:
        raise ConfigError("--topology=NAME is missing - e.g. --topology=v5e:4x4 or cpu:8")
    rest = [a for a in arguments if a != "--json" and not a.startswith("--topology=")]
    cfg = config.parse_arguments(rest)
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is not the result
        found = plan(cfg, named[0], topology_devices(named[0]))
    print(json.dumps(dataclasses.asdict(found)) if "--json" in arguments else found.table())
    fit.check_fits(found.total, found.limit, found.device)


if __name__ == "__main__":
    run_command(main)
