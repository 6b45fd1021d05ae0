"""LoReFT, edits of hidden states at some tokens of the prompt (Wu et al. 2024, arXiv 2404.03592).

    h' = h + R^T (W h + b - R h)        R, W [R, D], b [R]; the rows of R are orthonormal

h is what a layer gives to the next one. Edited are the first n and the last m tokens of a prompt,
of a short one at most half of it each, as in pyreft's `get_intervention_locations`; the first and
the last have weights of their own unless they are shared. Answers are not edited: they see keys and
values of edited states. DiReFT leaves out R h, and NoReFT lets R be any matrix.

What trains in place of R is a matrix A [D, R]: R^T is the orthonormal factor Q of A = Q U, with U
upper triangular and positive on its diagonal. So Q is unique, a smooth function of A, and A itself
if that is orthonormal (Golub and Van Loan, Matrix Computations, 5.2). pyreft has torch's product of
Householder reflections, which gives the same set of matrices.

PEFT does not have the method. Folders are jaxtune's own, of type REFT, with pyreft's names:
`layers.<l>.<first, last or shared>.rotate_layer` [D, R], `.weight` [R, D] and `.bias` [R].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxtune import ops
from jaxtune.errors import ConfigError
from jaxtune.nn.params import AdapterParam
from jaxtune.peft.base import Adapters, Format, kaiming
from jaxtune.sharding.rules import gathered


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of ReFT; no layers named: all."""

    rank: int
    reft_form: str = "loreft"
    reft_first_tokens: int = 1
    reft_last_tokens: int = 1
    reft_shared: bool = False
    layers_to_transform: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a prompt that have weights of their own."""
        if self.reft_shared:
            return ("shared",)
        counts = {"first": self.reft_first_tokens, "last": self.reft_last_tokens}
        return tuple(part for part, count in counts.items() if count)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The edited layers of a model with so many; ConfigError if it lacks one of them."""
        chosen = tuple(sorted(set(self.layers_to_transform))) or tuple(range(num_layers))
        if not 0 <= chosen[0] <= chosen[-1] < num_layers:
            raise ConfigError(
                f"peft.layers_to_transform={','.join(map(str, chosen))}: the model has layers 0 to "
                f"{num_layers - 1} - name some of these"
            )
        return chosen


READS = (Config,)
FINISHED = "reft"
SLOT = "edit"


class Values(NamedTuple):
    """With what a layer's output is edited; of several layers with a leading axis over them.

    The columns of all parts are side by side: float32 read [D, S*R], bias [S*R], write [S*R, D].
    """

    read: jax.Array
    bias: jax.Array
    write: jax.Array


class Part(nnx.Module):
    """What edits the tokens of one part of prompts, in n layers."""

    def __init__(self, num_layers: int, width: int, rank: int, mesh: Mesh | None):
        shape = (num_layers, width, rank)
        self.mesh = mesh
        self.basis = AdapterParam(jnp.zeros(shape), axes=("embed", None))
        self.weight = AdapterParam(jnp.zeros(shape), axes=("embed", None))
        self.bias = AdapterParam(jnp.zeros((num_layers, rank)), axes=(None,))

    def matrices(self, form: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        """R^T [n, D, R], W^T [n, D, R] and b [n, R]."""
        basis, weight = (
            gathered(x.get_value(), ("embed", None), self.mesh) for x in (self.basis, self.weight)
        )
        return basis if form == "noreft" else orthonormal(basis), weight, self.bias.get_value()


class Edit(nnx.Module):
    """The content of the decoder's slot."""

    def __init__(self, config: Config, num_layers: int, width: int, mesh: Mesh | None):
        self.config = config
        self.num_layers = num_layers
        self.layers = config.layers(num_layers)
        parts = {part: Part(len(self.layers), width, config.rank, mesh) for part in config.parts}
        self.parts = nnx.Dict(parts)

    def values(self) -> Values:
        """Of all L layers; those that are not edited have zeros."""
        found = []
        for part in self.config.parts:
            basis, weight, bias = self.parts[part].matrices(self.config.reft_form)
            read = weight if self.config.reft_form == "direft" else weight - basis
            found.append(Values(read, bias, basis))
        read, bias, write = (jnp.concatenate(x, axis=-1) for x in zip(*found, strict=True))
        edited = Values(read, bias, write.swapaxes(-1, -2))
        if len(self.layers) == self.num_layers:
            return edited
        where = np.array(self.layers)
        empty = jax.tree.map(lambda x: jnp.zeros((self.num_layers, *x.shape[1:])), edited)
        return jax.tree.map(lambda zeros, x: zeros.at[where].set(x), empty, edited)

    def places(self, positions: jax.Array, prompts: jax.Array) -> jax.Array:
        """Which tokens each part of the prompt holds: bool [B, T, S].

        Args:
            positions: int32 [B, T], of tokens in their examples.
            prompts: int32 [B, T] or [B, 1], tokens of the examples' prompts.
        """
        half, c = prompts // 2, self.config
        first = positions < jnp.minimum(half, c.reft_first_tokens)
        begin = prompts - jnp.minimum(half, c.reft_last_tokens)
        last = (positions >= begin) & (positions < prompts)
        held = {"first": first, "last": last, "shared": first | last}
        return jnp.stack([held[part] for part in c.parts], axis=-1)

    def __call__(self, x: jax.Array, values: Values, places: jax.Array) -> jax.Array:
        """A layer's output [B, T, D], edited at `places` [B, T, S]."""
        read, bias, write = (value.astype(x.dtype) for value in values)
        chosen = jnp.repeat(places, self.config.rank, axis=-1)
        return x + ops.matmul(jnp.where(chosen, ops.matmul(x, read) + bias, 0), write)


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Q of Q U = a matrix [..., D, R] of rank R, with U upper triangular, its diagonal positive."""
    q, u = jnp.linalg.qr(matrix)
    return jnp.where(jnp.diagonal(u, axis1=-2, axis2=-1) < 0, -1, 1)[..., None, :] * q


def attach(model: Any, adapters: Adapters) -> None:
    """Puts the edits into the slot of a decoder.

    Raises:
        ConfigError: layers that it does not have, or more rows of R than can be orthonormal.
    """
    config, width = adapters.config, model.config.hidden_size
    if config.rank > width:
        raise ConfigError(
            f"config.peft.rank={config.rank}: hidden states have {width} numbers, among which no "
            "more directions are orthonormal - use a smaller one"
        )
    model.edit = Edit(config, sum(model.stacks), width, model.policy.mesh)


def initial(
    leaf: str, shape: tuple[int, ...], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """First value of a variable, float32: of R any orthonormal rows, of W (and NoReFT's R) torch's
    for a linear layer, as in pyreft; of b zero.
    """
    if leaf.endswith("bias"):
        return np.zeros(shape, np.float32)
    if leaf.endswith("basis") and config.reft_form != "noreft":
        return np.linalg.qr(rng.standard_normal(shape))[0].astype(np.float32)
    return kaiming(rng, shape, shape[-2])


def sizes(
    config: Config, base_params: Mapping[str, Any], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a folder holds, by name; ConfigError: the base lacks a layer."""
    width, rank, found = base_params["embed.table"].shape[-1], config.rank, {}
    for layer in config.layers(num_layers):
        for part in config.parts:
            at = f"layers.{layer}.{part}"
            found[f"{at}.rotate_layer"] = (width, rank)
            found |= {f"{at}.weight": (rank, width), f"{at}.bias": (rank,)}
    return found


def stored(model: Any) -> dict[str, jax.Array]:
    """What a folder holds of a model, by name."""
    edit, found = model.edit, {}
    for part in edit.config.parts:
        basis, weight, bias = edit.parts[part].matrices(edit.config.reft_form)
        for i, layer in enumerate(edit.layers):
            at = f"layers.{layer}.{part}"
            found[f"{at}.rotate_layer"] = basis[i]
            found |= {f"{at}.weight": weight[i].T, f"{at}.bias": bias[i]}
    return found


def from_stored(
    arrays: Mapping[str, np.ndarray], config: Config, num_layers: int
) -> dict[str, np.ndarray]:
    """The variables of the slot, from what a folder holds.

    Raises:
        ValueError: the rows of an R are not orthonormal (but for rounding to bfloat16).
    """
    variables = {}
    for part in config.parts:
        at = [f"layers.{layer}.{part}" for layer in config.layers(num_layers)]
        basis, weight, bias = (
            np.stack([arrays[f"{name}.{leaf}"] for name in at])
            for leaf in ("rotate_layer", "weight", "bias")
        )
        products = basis.swapaxes(1, 2) @ basis
        apart = np.abs(products - np.eye(config.rank)).max(axis=(1, 2))
        if config.reft_form != "noreft" and apart.max() > 0.01:
            raise ValueError(f"{at[apart.argmax()]}.rotate_layer has no orthonormal columns")
        variables |= {f"parts.{part}.basis": basis, f"parts.{part}.bias": bias}
        variables[f"parts.{part}.weight"] = weight.swapaxes(1, 2)
    return variables


PEFT = Format("REFT", defaults={})


def to_peft(config: Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that say what the config says."""
    del layers
    return {
        "r": config.rank,
        "reft_form": config.reft_form,
        "positions": f"f{config.reft_first_tokens}+l{config.reft_last_tokens}",
        "share_weights": config.reft_shared,
        "layers_to_transform": list(config.layers_to_transform) or None,
    }


def from_peft(fields: Mapping[str, Any]) -> Config:
    """The knobs that `to_peft` writes; ValueError if they are not."""
    names = ("r", "reft_form", "share_weights", "positions", "layers_to_transform")
    found: list[Any] = [fields.get(name) for name in names]
    rank, form, shared, positions, layers = found
    counts = re.fullmatch(r"f(\d+)\+l(\d+)", str(positions))
    first, last = map(int, counts.groups()) if counts else (0, 0)
    right = (
        type(rank) is int and rank >= 1,
        form in ("loreft", "direft", "noreft"),
        type(shared) is bool,
        first + last > 0,
        layers is None or type(layers) is list and all(type(layer) is int for layer in layers),
    )
    if not all(right):
        wrong = [f"{names[i]}={found[i]!r}" for i, ok in enumerate(right) if not ok]
        raise ValueError(", ".join(wrong))
    return Config(
        rank=rank,
        reft_form=form,
        reft_first_tokens=first,
        reft_last_tokens=last,
        reft_shared=shared,
        layers_to_transform=tuple(layers or ()),
    )
