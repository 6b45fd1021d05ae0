"""Compiles attention, forward and backward, for a GPU that is not here.

    python tests/ops/compile_attention_gpu.py h100 2048 128 bfloat16

needs jax-cuda12-plugin and jax-cuda12-pjrt, but neither a driver nor a GPU. test_attention_gpu.py
runs it as a program, so that the plugin is not loaded into the process of the tests.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.ops.attention import Mask, make_operands, pallas_gpu
from jaxtune.planning.topology import topology_devices


def main(gpu: str, length: str, head_size: str, dtype: str) -> None:
    (device,) = topology_devices(f"{gpu}:1")
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())

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
