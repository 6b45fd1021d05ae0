"""Settings of the backend that a command makes first, and peak arithmetic of the devices."""

import ctypes
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dense bfloat16 FLOP/s by `device_kind`, from the vendors' data sheets.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}

# Memory by `device_kind`, GiB, likewise.
_MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32}


def peak_flops(device: Any, dtype: DTypeLike) -> float | None:
    """FLOP/s that one device could do; measured on a CPU, None for an accelerator not in the
    table.
    """
    if device.platform == "cpu":
        return _measured(dtype)
    return _of_kind(_PEAKS, device)


def _of_kind(table: Mapping[str, Any], device: Any) -> Any:
    kinds = [kind for kind in table if device.device_kind.startswith(kind)]
    return table[max(kinds, key=len)] if kinds else None


def memory_bytes(device: Any) -> int | None:
    """Bytes that a program may use on a device: of a CPU what is free now; None: unknown.

    Of a device that is only described what its data sheet says.
    """
    if device.platform != "cpu":
        try:
            return (device.memory_stats() or {}).get("bytes_limit")
        except (AttributeError, jax.errors.JaxRuntimeError):  # not addressable
            known = _of_kind(_MEMORY, device)
            return None if known is None else known * 2**30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


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
