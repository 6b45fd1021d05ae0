"""Settings of the backend that a command makes first, and peak arithmetic of the devices."""

import ctypes
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class Chip:
    """What the vendor's data sheet says of one device.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes/s between the device and its memory.
        network: bytes/s that it receives over all its links to the devices of its slice or host
            (ICI, NVLink or PCIe).
        clock: Hz in which XLA for TPU counts cycles; None: XLA counts none.
        host_devices: how many devices share `network`; None: all of a slice.
        between_hosts: bytes/s that it receives from devices of other hosts (one 400 Gbit/s port
            each, A100: 200); None: a host has the only devices.
    """

    flops: float
    memory: int
    bandwidth: float
    network: float
    clock: float | None = None
    host_devices: int | None = None
    between_hosts: float | None = None


GIB = 2**30
# By `device_kind`. TPUs: Google Cloud's pages of each version; a clock is the peak divided by the
# products of a cycle (arXiv 2304.01433 for v4). GPUs: NVIDIA's data sheets, without sparsity, of
# the SXM boards; those without NVLink are taken to have PCIe 4.0 x16.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 1.05e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9, 1.5e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9, 1.75e9),
    "TPU v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 1.75e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 448e9, 1.75e9),
    "NVIDIA A100": Chip(312e12, 80 * GIB, 2039e9, 300e9, None, 8, 25e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1555e9, 300e9, None, 8, 25e9),
    "NVIDIA H100": Chip(989e12, 80 * GIB, 3350e9, 450e9, None, 8, 50e9),
    "NVIDIA H200": Chip(989e12, 141 * 10**9, 4800e9, 450e9, None, 8, 50e9),
    "NVIDIA L4": Chip(121e12, 24 * GIB, 300e9, 32e9, None, 8),
    "NVIDIA L40S": Chip(362e12, 48 * GIB, 864e9, 32e9, None, 8),
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24 * GIB, 936e9, 32e9, None, 8),
    "NVIDIA GeForce RTX 4090": Chip(165e12, 24 * GIB, 1008e9, 32e9, None, 8),
}


def chip(device_kind: str) -> Chip | None:
    """The data sheet of a kind of device; None: a CPU, or not in the table."""
    kinds = [kind for kind in CHIPS if re.match(rf"{kind}\b", device_kind)]
    return CHIPS[max(kinds, key=len)] if kinds else None


def peak_flops(device: Any, dtype: DTypeLike) -> float | None:
    """FLOP/s that one device could do; measured on a CPU, None for an accelerator not in the
    table.
    """
    if device.platform == "cpu":
        return _measured(dtype)
    known = chip(device.device_kind)
    return None if known is None else known.flops


def memory_bytes(device: Any) -> int | None:
    """Bytes that a program may use on a device; None: unknown.

    Of a device that is only described what its data sheet says; of a CPU what is free now, in equal
    parts for the devices that it simulates.
    """
    if device.platform != "cpu":
        try:
            return (device.memory_stats() or {}).get("bytes_limit")
        except (AttributeError, jax.errors.JaxRuntimeError):  # not addressable
            known = chip(device.device_kind)
            return None if known is None else known.memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 // jax.local_device_count("cpu")


def _measured(dtype: DTypeLike) -> float:
    """The best of five square matrix products."""
    size = 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def prepare(compilation_cache: str) -> None:
    """Keeps compiled programs between runs and, on CPU, freed memory within one.

    Args:
        compilation_cache: folder; empty: none. JAX_COMPILATION_CACHE_DIR takes precedence.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = str(Path(compilation_cache).expanduser()) if compilation_cache else None
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks in the process instead of returning them to the kernel.

    XLA for CPU allocates and frees its temporaries, gigabytes, on every execution; by default each
    such block is a new mapping whose pages the kernel zeroes again one by one. Call it before
    anything large is allocated; elsewhere than on glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # M_* of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
