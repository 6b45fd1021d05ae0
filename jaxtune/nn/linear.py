"""A linear layer with a slot for an adapter.

The slot holds None or a module that is called with the input and the layer itself, and returns the
layer's whole output. Kernels are [D_in, D_out]; layers of a stack have a leading axis.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxtune import ops
from jaxtune.nn.experts import ExpertLinear
from jaxtune.nn.params import Policy
from jaxtune.quant import QArray, plain_scales
from jaxtune.sharding.mesh import on_shards
from jaxtune.sharding.rules import fetched, gathered, gathered_specs, spec
from jaxtune.tree import path_name


class Linear(nnx.Module):
    """y = x W + b, or what the adapter in the slot makes of it."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str, str],
        policy: Policy,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        normal = nnx.initializers.normal(0.02)
        self.axes = axes
        self.policy = policy
        self.kernel = nnx.Param(normal(rngs.params(), (d_in, d_out), policy.param_dtype), axes=axes)
        self.bias: Any = nnx.data(None)
        if bias:
            zeros = jnp.zeros((d_out,), policy.param_dtype)
            self.bias = nnx.Param(zeros, axes=(axes[1],))
        self.adapter: Any = nnx.data(None)

    def project(self, x: jax.Array) -> jax.Array:
        """The layer without its adapter: [..., D_in] -> [..., D_out]."""
        return self.add_bias(self.product(x, self.weight()))

    def adapt(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """The layer with the low-rank product a b added to its weight: x (W + a b) + bias.

        Args:
            x: [..., D_in].
            a: [D_in, R].
            b: [R, D_out], scaled already.
        """
        return self.add_bias(self.adapted_product(x, self.weight(), a, b))

    def weight(self) -> Any:
        """The kernel on the device, its shards brought together."""
        weight = self.kernel.get_value()
        if self.policy.offload_frozen:
            weight = fetched(weight, self.axes, self.policy.mesh)
        return self._gathered(weight, self.axes)

    def product(self, x: jax.Array, weight: Any) -> jax.Array:
        """x W without the bias, for `weight()`: [..., D_in] -> [..., D_out]."""
        return product(x, weight, self.axes, self.policy)

    def adapted_product(self, x: jax.Array, weight: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        """x (W + a b) without the bias, for `weight()`; see `adapt`."""
        if _is_mapped(weight, x, self.policy):
            return self.product(x, weight) + self.low_rank(x, a, b)
        return ops.adapted_matmul(x, weight, *self.gathered_pair(a, b))

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """x a b: [..., D_in] -> [..., D_out]."""
        a, b = (matrix.astype(x.dtype) for matrix in self.gathered_pair(a, b))
        return ops.dot(ops.dot(x, a, x.dtype), b, x.dtype)

    def gathered_pair(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a [D_in, R] and b [R, D_out] with their shards brought together, as the kernel's are."""
        in_axis, out_axis = self.axes
        gather = functools.partial(self._gathered, is_small=True)
        return gather(a, (in_axis, None)), gather(b, (None, out_axis))

    def _gathered(
        self, weight: Any, axes: tuple[str | None, str | None], *, is_small: bool = False
    ) -> Any:
        scatter = self.policy.sharding_stage > 1
        return gathered(weight, axes, self.policy.mesh, scatter=scatter, is_small=is_small)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias, if the layer has one."""
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.project(x) if self.adapter is None else self.adapter(x, self)
        return checkpoint_name(y, "linear")


def product(x: jax.Array, weight: Any, axes: tuple[str, str], policy: Policy) -> jax.Array:
    """x [B, ..., D_in] times a gathered weight: [B, ..., D_out]."""
    implementation = _implementation(weight, policy)
    if policy.mesh is None or policy.mesh.size == 1 or not _is_mapped(weight, x, policy):
        return ops.matmul(x, weight, implementation=implementation)
    mapped = functools.partial(
        _mapped_product, axes=axes, mesh=policy.mesh, implementation=implementation
    )
    # Decoded scales need not be kept for the backward pass.
    return jax.checkpoint(mapped, prevent_cse=False)(x, weight)


def _implementation(weight: Any, policy: Policy) -> str:
    """The implementation of a product with this weight.

    XLA for TPU reads the codes of columns with one scale each as an operand of its own product,
    which keeps the matrix unit busier than the kernel does; other codes it would decode to memory.
    """
    if not isinstance(weight, QArray):
        return "xla"
    if policy.matmul != "auto":
        return policy.matmul
    is_by_column = weight.format == "int8" and weight.group_rows == weight.shape[-2]
    return "xla" if is_by_column and weight.zero is None else "pallas_tpu"


def _is_mapped(weight: Any, x: jax.Array, policy: Policy) -> bool:
    """Whether each device multiplies its own parts, instead of the compiler partitioning it.

    A kernel cannot be partitioned. The compiler would sum the products of tensor shards in float32
    before it rounds them: twice the bytes of the activations.
    """
    if _implementation(weight, policy) != "xla":
        return True
    has_tensor = policy.mesh is not None and policy.mesh.shape.get("tensor", 1) > 1
    return has_tensor and x.dtype != jnp.float32


def _mapped_product(
    x: jax.Array, weight: Any, *, axes: tuple[str, str], mesh: Mesh, implementation: str
) -> jax.Array:
    weight = plain_scales(weight)
    weight_specs = gathered_specs(weight, axes, mesh)
    rows, columns = weight_specs.codes if isinstance(weight, QArray) else weight_specs

    def leading(length: str) -> PartitionSpec:
        return spec(x.shape[:-1], (("batch", length) + (None,) * x.ndim)[: x.ndim - 1], mesh)

    tokens = leading("length")
    # Sums over tensor shards go where the residual is, each shard's tokens to itself.
    summed = tokens if rows is None else leading("residual_length")

    def multiply(x: jax.Array, weight: Any) -> jax.Array:
        y = ops.matmul(x, weight, implementation=implementation)
        if summed != tokens:
            return jax.lax.psum_scatter(y, rows, scatter_dimension=1, tiled=True)
        return y if rows is None else jax.lax.psum(y, rows)

    in_specs = (PartitionSpec(*tokens, rows), weight_specs)
    return on_shards(multiply, mesh, in_specs, PartitionSpec(*summed, columns))(x, weight)


def linears(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model, those of experts too, with their dotted paths."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, Linear | ExpertLinear):
            yield path_name(path), module


def layer_names(path: str, stacks: tuple[int, ...]) -> list[tuple[int | None, str]]:
    """(index, name) of each layer behind a path: layers.1.attn -> [(4, layers.4.attn), ...]."""
    parts = path.split(".")
    if parts[0] != "layers":
        return [(None, path)]
    first = sum(stacks[: int(parts[1])])
    rest = ".".join(parts[2:])
    return [(first + i, f"layers.{first + i}.{rest}") for i in range(stacks[int(parts[1])])]
