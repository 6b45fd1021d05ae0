"""Compiles an optimizer's step for a TPU that is not there; prints its memory as JSON.

python tests/optim/compile_tpu.py NAME offload|stay
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.optim import make_apply, make_optimizer
from jaxtune.schema import Optim
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import HOST

AXES = {"layers.0.up.kernel": ("embed", "mlp"), "layers.0.norm.scale": ("embed",)}
SHAPES = {"layers.0.up.kernel": (16, 1024, 2048), "layers.0.norm.scale": (16, 1024)}


def main(name: str, offload: bool) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    devices = np.array(topology.devices).reshape(1, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    numbers = Optim(name=name, weight_decay=0.1, offload=offload)
    tx = make_optimizer(numbers, lambda count: 1e-3, AXES)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if getattr(key, "key", None) in AXES]
        where = rules.sharding(leaf.shape, AXES[names[-1]], mesh) if names else whole
        if offload and names and len(AXES[names[-1]]) >= 2 and "kept" in str(path[0]):
            where = where.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    given = {"params": params, "kept": jax.eval_shape(tx.init, params)}
    given = jax.tree_util.tree_map_with_path(place, given)
    good = jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(
        functools.partial(make_apply(numbers, AXES), tx),
        donate_argnums=(1, 2),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, (given["params"], given["kept"])),
    )
    compiled = step.lower(given["params"], given["params"], given["kept"], good, norm).compile()
    plan = compiled.memory_analysis()
    print(
        json.dumps(
            {
                "weights": sum(np.prod(shape) for shape in SHAPES.values()) // 4 * 4,
                "arguments": plan.argument_size_in_bytes,
                "temporaries": plan.temp_size_in_bytes,
                "host_arguments": plan.host_argument_size_in_bytes,
                "host_results": plan.host_output_size_in_bytes,
                "host_temporaries": plan.host_temp_size_in_bytes,
                "collectives": compiled.as_text().count("all-"),
            },
            default=int,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "offload")
