"""An adapted layer of a mesh, compiled for TPUs that are not there."""

import os
import subprocess
import sys

import pytest

from jaxtune.planning.topology import DEVICELESS

# A layer of Llama-3.1-8B over 16 chips; prints how often the gradients of a and b send shards on.
COMPILE = """
import functools, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from flax import nnx
from jaxtune.nn.linear import Linear
from jaxtune.nn.params import Policy
from jaxtune.sharding.mesh import make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = make_mesh({"data": 1, "fsdp": 16, "tensor": 1}, devices)
policy = Policy(mesh=mesh, param_dtype=jnp.bfloat16)

def make():
    return Linear(4096, 1024, axes=("embed", "kv_heads"), policy=policy, rngs=nnx.Rngs(0))

graph, params = nnx.split(nnx.eval_shape(make))

def loss(pair, params, x):
    return nnx.merge(graph, params).adapt(x, *pair).astype(jnp.float32).sum()

def at(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

pair = at((4096, 16), jnp.float32, "fsdp"), at((16, 1024), jnp.float32)
params = jax.tree.map(lambda leaf: at(leaf.shape, leaf.dtype, "fsdp"), params)
x = at((16, 2048, 4096), jnp.bfloat16, "fsdp")
places = jax.tree.map(lambda leaf: leaf.sharding, pair)
step = jax.jit(jax.grad(loss), out_shardings=places)
text = step.lower(pair, params, x).compile().as_text()
print("all-reduce(" in text or "reduce-scatter(" in text, text.count("collective-permute"))
"""


@pytest.mark.slow
def test_gradients_of_an_adapter_are_summed_at_once():
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    command = [sys.executable, "-c", COMPILE]
    found = subprocess.run(command, env=os.environ | DEVICELESS, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == ["True", "0"]
