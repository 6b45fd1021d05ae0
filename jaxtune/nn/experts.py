"""The experts of a mixture: gated MLPs, through which rows go that are sorted by expert.

Nothing is dropped and nothing is padded: each projection is one product of all rows, in which a
row meets the matrix of its expert (`ops.grouped_matmul`; MegaBlocks, Gale et al. 2022, arXiv
2211.15841).

On a mesh every device computes its own experts. The rows of the axis `expert` are brought together,
each shard computes what its experts add to them, and the sums go back to where the rows are. With
an exchange of single tokens instead, the arrays that receive them would have to be as large, for
all tokens may choose one shard's experts; XLA for CPU does not have the exchange.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxtune import ops
from jaxtune.nn.params import Policy
from jaxtune.quant import QArray, plain_scales
from jaxtune.sharding.mesh import on_shards
from jaxtune.sharding.rules import RESIDUAL, TOKENS, fetched, gathered, gathered_specs, spec

Gate = Callable[[jax.Array, jax.Array], jax.Array]


class Weights(NamedTuple):
    """What rows are multiplied with, or where that lies on a mesh.

    Attributes:
        kernel: [E, D_in, D_out], an array or quantized.
        bias: [E, D_out], or None.
        a, b: [E, D_in, R] and [E, R, D_out], whose product is added to the kernel; None: nothing.
    """

    kernel: Any
    bias: Any
    a: Any
    b: Any


class ExpertLinear(nnx.Module):
    """One linear layer for each expert.

    The slot `adapter` holds None or a module whose `low_rank()` gives what is added to the
    kernels: [E, D_in, R] and [E, R, D_out].
    """

    def __init__(
        self,
        num_experts: int,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str, str],
        policy: Policy,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.axes = ("experts", *axes)
        self.policy = policy
        normal = nnx.initializers.normal(0.02)
        values = normal(rngs.params(), (num_experts, d_in, d_out), policy.param_dtype)
        self.kernel = nnx.Param(values, axes=self.axes)
        self.bias: Any = nnx.data(None)
        if bias:
            zeros = jnp.zeros((num_experts, d_out), policy.param_dtype)
            self.bias = nnx.Param(zeros, axes=("experts", axes[1]))
        self.adapter: Any = nnx.data(None)

    def weights(self) -> Weights:
        """Kernel, bias and adapter on the device, their shards brought together."""
        experts, rows, columns = self.axes
        kernel = self.kernel.get_value()
        if self.policy.offload_frozen:
            kernel = fetched(kernel, self.axes, self.policy.mesh)
        bias = None if self.bias is None else self.bias.get_value()
        a, b = (None, None) if self.adapter is None else self.adapter.low_rank()
        return Weights(
            self._gathered(kernel, self.axes),
            bias,
            self._gathered(a, (experts, rows, None)),
            self._gathered(b, (experts, None, columns)),
        )

    def specs(self, weights: Weights, mesh: Mesh, *, whole: bool = False) -> Weights:
        """Where `weights()` lie; `whole`: or are brought to, hidden features not cut."""
        names = (None if whole and axis == "mlp" else axis for axis in self.axes)
        experts, rows, columns = names
        axes = Weights(
            (experts, rows, columns),
            (experts, columns),
            (experts, rows, None),
            (experts, None, columns),
        )
        found = (
            None if leaf is None else gathered_specs(leaf, names, mesh)
            for leaf, names in zip(weights, axes, strict=True)
        )
        return Weights(*found)

    def _gathered(self, weight: Any, axes: tuple[str | None, ...]) -> Any:
        if weight is None:
            return None
        policy = self.policy
        return gathered(weight, axes, policy.mesh, scatter=policy.sharding_stage > 1)


class Experts(nnx.Module):
    """The sum of down(gate(x) * up(x)) over each token's experts, by their weights."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        gate: Gate,
        bias: bool = False,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        """Describes or makes the experts.

        Args:
            num_experts: E.
            width, hidden: D and F.
            gate: outputs of `gate_proj` and `up_proj` -> what goes into `down_proj`.
            bias: whether the projections have biases.
            policy: how they are computed.
            rngs: of the first values.
        """
        make = functools.partial(ExpertLinear, num_experts, bias=bias, policy=policy, rngs=rngs)
        self.num_experts = num_experts
        self.gate = gate
        self.policy = policy
        self.gate_proj = make(width, hidden, axes=("embed", "mlp"))
        self.up_proj = make(width, hidden, axes=("embed", "mlp"))
        self.down_proj = make(hidden, width, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """Sends every token through its experts.

        Args:
            x: [B, T, D].
            chosen: int32 [B, T, k], each token's experts.
            weights: float32 [B, T, k], of their outputs.

        Returns:
            [B, T, D] in x's dtype.
        """
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        given = tuple(layer.weights() for layer in layers)
        mesh = self.policy.mesh
        matmul = "xla" if self.policy.matmul == "xla" else "pallas_tpu"
        mixed = functools.partial(_mixed, gate=self.gate, matmul=matmul)
        if mesh is None or mesh.size == 1:
            return mixed(x, chosen, weights, given)
        given = tuple(one._replace(kernel=plain_scales(one.kernel)) for one in given)
        parts = tuple(layer.specs(one, mesh) for layer, one in zip(layers, given, strict=True))
        tokens = spec(x.shape, TOKENS, mesh)
        down = parts[2].kernel
        experts, features, _ = down.codes if isinstance(down, QArray) else down
        if features is None:  # no shard may cut down's blocks, so none has a part of its inputs
            parts = tuple(
                layer.specs(one, mesh, whole=True) for layer, one in zip(layers, given, strict=True)
            )
        # Sums over tensor shards go where the residual is, each shard's tokens to itself.
        summed = tokens if features is None else spec(x.shape, RESIDUAL, mesh)
        crosses = experts is not None and "expert" in (tokens[0] or ())

        def own(x: jax.Array, chosen: jax.Array, weights: jax.Array, given: Any) -> jax.Array:
            if crosses:
                x, chosen, weights = (
                    jax.lax.all_gather(rows, experts, tiled=True) for rows in (x, chosen, weights)
                )
            if experts is not None:
                chosen = chosen - jax.lax.axis_index(experts) * given[2].kernel.shape[0]
            if features is not None and given[2].bias is not None:
                is_first = jax.lax.axis_index(features) == 0
                given = (*given[:2], given[2]._replace(bias=given[2].bias * is_first))
            y = mixed(x, chosen, weights, given)
            if summed != tokens:
                y = jax.lax.psum_scatter(y, features, scatter_dimension=1, tiled=True)
            elif features is not None:
                y = jax.lax.psum(y, features)
            if crosses:
                return jax.lax.psum_scatter(y, experts, tiled=True)
            return y if experts is None else jax.lax.psum(y, experts)

        specs = (tokens, tokens, tokens, parts)
        return on_shards(own, mesh, specs, summed)(x, chosen, weights, given)


def _mixed(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    given: tuple[Weights, ...],
    *,
    gate: Gate,
    matmul: str,
) -> jax.Array:
    """What the given experts, numbered from 0, add to the tokens; other numbers add nothing.

    Args:
        x: [B, T, D].
        chosen: int32 [B, T, k].
        weights: float32 [B, T, k].
        given: of gate, up and down.
        gate: see `Experts`.
        matmul: implementation of `ops.grouped_matmul`.
    """
    product = functools.partial(ops.grouped_matmul, implementation=matmul)
    num_experts, k = given[0].kernel.shape[0], chosen.shape[-1]
    numbers = chosen.reshape(-1)
    here = (numbers >= 0) & (numbers < num_experts)
    numbers = jnp.where(here, numbers, num_experts)
    order = jnp.argsort(numbers)
    back = jnp.argsort(order)
    owner = numbers[order]  # of each row, E for those that nobody computes
    ends = jnp.searchsorted(owner, jnp.arange(num_experts), side="right").astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=0)
    is_real = (owner < num_experts)[:, None]

    def project(rows: jax.Array, w: Weights) -> jax.Array:
        y = product(rows, w.kernel, sizes)
        if w.a is not None:
            y += product(product(rows, w.a, sizes), w.b, sizes)
        if w.bias is not None:
            own = w.bias.astype(y.dtype)[jnp.minimum(owner, num_experts - 1)]
            y += jnp.where(is_real, own, 0)  # nor gets a gradient from the others
        return checkpoint_name(y, "linear")

    # What stands behind the last group is not defined, both ways.
    rows = jnp.where(is_real, _to_experts(x.reshape(-1, x.shape[-1]), order, back), 0)
    y = project(gate(project(rows, given[0]), project(rows, given[1])), given[2])
    y = _from_experts(jnp.where(is_real, y, 0), order, back).reshape(-1, k, x.shape[-1])
    y = jnp.einsum("mkd,mk->md", y, weights.reshape(-1, k), preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(x.shape)


# Both are gathers of rows, and so are their gradients, which autodiff would scatter.


@jax.custom_vjp
def _to_experts(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """[M, D] -> [M k, D], k copies of each row in the given order; `back` is its inverse."""
    return x[order // (order.shape[0] // x.shape[0])]


def _to_experts_backward(saved: tuple, g: jax.Array) -> tuple:
    back, count = saved
    copies = g[back].reshape(count, -1, g.shape[-1])
    return copies.sum(axis=1, dtype=jnp.float32).astype(g.dtype), None, None


_to_experts.defvjp(
    lambda x, order, back: (_to_experts(x, order, back), (back, x.shape[0])), _to_experts_backward
)


@jax.custom_vjp
def _from_experts(y: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """[M k, D] -> [M k, D] in the order before the sort."""
    del order
    return y[back]


_from_experts.defvjp(
    lambda y, order, back: (_from_experts(y, order, back), order),
    lambda order, g: (g[order], None, None),
)
