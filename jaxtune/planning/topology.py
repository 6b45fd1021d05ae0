"""Devices to compile for: TPU slices through libtpu, NVIDIA GPUs through the CUDA plugin, CPUs.

Neither libtpu nor the plugin needs its hardware, or a driver. A GPU is described to the compiler by
the numbers of its data sheet.
"""

import importlib.util
import math
import os
import re
from typing import Any

import jax

from jaxtune import hardware
from jaxtune.errors import ConfigError

# libtpu asks the machine about its TPUs before it compiles, unless it is told not to.
DEVICELESS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_NO_TUNING = "--xla_gpu_autotune_level=0"  # nothing is there to time candidates on
# The smallest slice that libtpu describes. Not v4, of which it describes cores instead of chips.
_HOSTS = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock} l2_cache_size: {l2}
  cuda_compute_capability {{ {capability} }} threads_per_core_limit: {threads}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{kind}"
"""
_CAPABILITIES = {  # compute capability: what all GPUs of a generation share
    "8.0": {"fpus": 64, "threads": 2048, "shared": 167936, "shared_optin": 166912},
    "8.6": {"fpus": 128, "threads": 1536, "shared": 102400, "shared_optin": 101376},
    "8.9": {"fpus": 128, "threads": 1536, "shared": 102400, "shared_optin": 101376},
    "9.0": {"fpus": 128, "threads": 2048, "shared": 233472, "shared_optin": 232448},
}
# Name: device_kind, compute capability, cores (SMs), GHz, MiB of L2 cache.
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 40),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", "8.0", 108, 1.41, 40),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 50),
    "h200": ("NVIDIA H200", "9.0", 132, 1.98, 50),
    "l4": ("NVIDIA L4", "8.9", 58, 2.04, 48),
    "l40s": ("NVIDIA L40S", "8.9", 142, 2.52, 96),
    "rtx3090": ("NVIDIA GeForce RTX 3090", "8.6", 82, 1.695, 6),
    "rtx4090": ("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 72),
}


def topology_devices(name: str) -> list[Any]:
    """Devices to compile for: TPUs `v5e:4x4`, NVIDIA GPUs `h100:8`, or simulated CPUs `cpu:8`.

    Call it before JAX has made its first array.

    Raises:
        ConfigError: an unknown name, or the compiler is missing or refuses.
    """
    kind, _, shape = name.partition(":")
    is_count = re.fullmatch(r"[1-9]\d*", shape)
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and is_count:
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices()
    if kind in _GPUS and is_count:
        return _gpus(name, kind, int(shape))
    if kind in _HOSTS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return _tpus(name, kind, shape)
    raise ConfigError(
        f"--topology={name}: must be {', '.join(_HOSTS)} with a shape (v5e:4x4), or "
        f"{', '.join(_GPUS)} or cpu with a number (h100:8)"
    )


def _tpus(name: str, kind: str, shape: str) -> list[Any]:
    os.environ.update(DEVICELESS)
    count = math.prod(map(int, shape.split("x")))
    whole = f"{kind}:{shape if count >= 4 else _HOSTS[kind]}"
    try:
        found = _described(name, "libtpu", platform="tpu", topology_name=whole)
    except ImportError as error:
        raise ConfigError(f"--topology={name} needs libtpu: pip install 'jaxtune[tpu]'") from error
    return found[: count if count < 4 else None]


def _gpus(name: str, kind: str, count: int) -> list[Any]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(
            f"--topology={name} needs JAX's plugin for CUDA, no driver and no GPU: "
            "pip install 'jaxtune[cuda]'"
        )
    chip: Any = hardware.chip(_GPUS[kind][0])
    host = min(count, chip.host_devices)
    if count > host and (count % host or chip.between_hosts is None):
        most = f"up to {host}" + (f", or a multiple of {host}" if chip.between_hosts else "")
        raise ConfigError(f"--topology={name}: hosts have {host} {kind} each - use {most}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of a driver
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_TUNING}"
    shape = f"1x{count // host}x{host}"
    return _described(name, "XLA", platform="cuda", target_config=gpu_target(kind), topology=shape)


def gpu_target(kind: str) -> str:
    """XLA's description of a GPU by its short name."""
    device_kind, capability, cores, clock, l2 = _GPUS[kind]
    major, minor = capability.split(".")
    chip: Any = hardware.chip(device_kind)
    return _TARGET.format(
        kind=device_kind,
        cores=cores,
        clock=clock,
        l2=l2 << 20,
        capability=f"major: {major} minor: {minor}",
        bandwidth=chip.bandwidth,
        memory=chip.memory,
        **_CAPABILITIES[capability],
    )


def _described(name: str, compiler: str, **asked: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**asked).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--topology={name}: {compiler} says: {first}") from error
