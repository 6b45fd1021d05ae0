"""Kinds of variables, and the policy by which layers are computed.

Every parameter names its trailing axes (`axes=("embed", "mlp")`); axes before those are stacks of
layers. Sharding, adapters and the weight table follow from these names.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike


class AdapterParam(nnx.Param):
    """A trainable parameter that an adapter adds to the model."""


class HeadParam(nnx.Param):
    """A parameter of a head for labels, which trains with every method."""


class LoadParam(nnx.Param):
    """A number for each expert of a router, which learns from their loads (`nn.moe`)."""


class AdapterConstant(nnx.Variable):
    """A number that belongs to an adapter and is not trained (its scale)."""


class SharedConstant(AdapterConstant):
    """A constant without layer axis: the same array for all layers of a stack."""


class SeedKey(nnx.Variable):
    """A random key put into a slot for one forward pass; without it there is no noise."""


@dataclass(frozen=True)
class Policy:
    """How a model is computed, apart from what it computes.

    Attributes:
        param_dtype: dtype of the parameters that the constructor makes.
        compute_dtype: dtype of activations and matmul operands.
        softmax_dtype: dtype of attention probabilities.
        attention: implementation of attention, a name of `ops.attention.IMPLEMENTATIONS`.
        matmul: implementation of products with quantized weights: "xla", "pallas_tpu", or "auto",
            which is for TPUs and goes by the weight.
        layers: "scan" (stacked) or "unroll" (one stack per layer).
        remat: what the backward pass recomputes, a name of `nn.stack.REMAT`.
        offload_frozen: the layers' frozen matrices are in host memory.
        sharding_stage: 3, or less: parameters are whole along the axes of `rules.GATHERED`.
        context_parallel: how attention crosses the mesh's sequence axis: "ring" or "ulysses".
        mesh: the devices, over whose axes weights are gathered and kernels mapped; None: one.
        micro_batches: parts of the rows that follow each other through the mesh's stages.
        chunks: stacks of a scanned model; every stage has a part of each.
        imbalance: layers with experts say how unevenly tokens choose (`MoE.imbalance`).
        counts_loads: what a `LoadParam` gets for a gradient is how many tokens each expert has.
        segments: sizes of the stacks of a scanned model, where some train and others do not; ():
            equal chunks.
    """

    param_dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike = jnp.float32
    softmax_dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    matmul: str = "xla"
    layers: str = "scan"
    remat: str = "none"
    offload_frozen: bool = False
    sharding_stage: int = 3
    context_parallel: str = "ring"
    mesh: Mesh | None = None
    micro_batches: int = 1
    chunks: int = 1
    imbalance: bool = False
    counts_loads: bool = False
    segments: tuple[int, ...] = ()


_ATTENTION = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}


def suited_policy(platform: str, **chosen: Any) -> Policy:
    """A policy with the fields that are `chosen` (None: not chosen) and else what suits a platform.

    Args:
        platform: "cpu", "gpu" or "tpu".
        chosen: fields of `Policy`.
    """
    on_cpu = platform == "cpu"
    given = {name: value for name, value in chosen.items() if value is not None}
    compute = jnp.dtype(given.get("compute_dtype", "float32" if on_cpu else "bfloat16"))
    # XLA for CPU converts a whole bfloat16 stack to float32 and back at every layer of a scan.
    # Weights that are fetched or picked must not be kept, and come in a scan.
    stays = not given.get("offload_frozen") and given.get("chunks", 1) == 1
    layers = "unroll" if on_cpu and compute == jnp.bfloat16 and stays else "scan"
    fields: dict[str, Any] = {
        "compute_dtype": compute,
        "param_dtype": compute,
        "softmax_dtype": compute,
    }
    fields |= {"layers": layers, "remat": "none" if stays and on_cpu else "full"}
    fields |= {"attention": _ATTENTION.get(platform, "xla")}
    fields |= {"matmul": "auto" if platform == "tpu" else "xla"} | given
    dtypes: dict[str, Any] = {
        name: jnp.dtype(value) for name, value in fields.items() if name.endswith("dtype")
    }
    return Policy(**(fields | dtypes))
