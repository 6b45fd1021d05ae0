"""Compiles quantized kernels' `dequantize` for a TPU that is not here; prints its temporaries.

    TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_HOSTNAMES=localhost \\
        ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu python tests/quant/compile_tpu.py 4096 14336

needs libtpu. test_tpu.py runs it as a program, so that libtpu is not loaded into the tests'
process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import quant


def main() -> None:
    rows, columns = map(int, sys.argv[1:])
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    chip = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())

    def temporaries(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
        )
        compiled = jax.jit(function, out_shardings=chip).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory
        return {"temp": memory.temp_size_in_bytes, "gather": " gather(" in str(compiled.as_text())}

    found = {}
    for format, chosen in quant.FORMATS.items():
        q = jax.eval_shape(
            lambda k, f=format, d=chosen.nests: quant.quantize(k, f, double_quant=d),
            jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        )
        found[format] = temporaries(lambda q: quant.dequantize(q, jnp.bfloat16), q)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
