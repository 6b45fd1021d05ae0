"""Compiles attention, forward and backward, for a GPU that is not here.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 XLA_FLAGS=--xla_gpu_autotune_level=0 \\
        python tests/ops/compile_attention_gpu.py h100 2048 128 bfloat16

needs jax-cuda12-plugin and jax-cuda12-pjrt, but neither a driver nor a GPU. test_attention_gpu.py
runs it as a program, so that the plugin is not loaded into the process of the tests.
"""

import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.ops.attention import Mask, make_operands, pallas_gpu

# What XLA asks of a device, from the data sheets.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 {limits} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132 "
        "fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 "
        "l2_cache_size: 52428800 device_memory_size: 84929347584 "
        "cuda_compute_capability { major: 9 }",
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108 "
        "fpus_per_core: 64 clock_rate_ghz: 1.41 memory_bandwidth: 2039000000000 "
        "l2_cache_size: 41943040 device_memory_size: 84987740160 "
        "cuda_compute_capability { major: 8 }",
    ),
    "rtx4090": (
        "NVIDIA GeForce RTX 4090",
        "shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 core_count: 128 "
        "fpus_per_core: 128 clock_rate_ghz: 2.52 memory_bandwidth: 1008000000000 "
        "l2_cache_size: 75497472 device_memory_size: 25757220864 "
        "cuda_compute_capability { major: 8 minor: 9 }",
    ),
}


def main(gpu: str, length: str, head_size: str, dtype: str) -> None:
    name, limits = GPUS[gpu]
    target = TARGET.format(name=name, limits=limits)
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, dy: jax.Array) -> tuple:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = Mask(query_segments=ids, key_segments=ids)
            return pallas_gpu.attend(make_operands(q, k, v, mask, softmax_dtype=dtype))[0]

        y, pullback = jax.vjp(attend, q, k, v)
        return y, pullback(dy)

    t, h = int(length), int(head_size)
    q, k, ids = array(2, t, 8, h), array(2, t, 2, h), array(2, t, dtype="int32")
    compiled = jax.jit(step).lower(q, k, k, ids, q).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    kernels = text.count("__gpu$xla.gpu.triton")
    print(f"kernels {kernels} temp {memory.temp_size_in_bytes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
