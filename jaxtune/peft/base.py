"""What methods share. A method is a module of this folder and a row of `peft.METHODS`.

Every method has

    READS      dataclasses whose fields are the options of `schema.Peft` that it reads; the first
               is `Config`, its knobs

A method that attaches nothing has

    trained    names of the base's parameters, and sizes of the stacks of layers -> those that
               train

and one that trains some layers may have

    segments   number of layers -> sizes of the stacks into which it cuts them, so that each trains
               as a whole or not at all
    origins    number of the base's layers -> the layers of a deeper model
    active     number of a turn -> the layers that train in it, if not all that are `trained` do

A method that attaches something also has

    attach     fills slots of a model (under `tree.describe`) for `Adapters`
    initial    name and shape of a variable -> its first value, of one layer
    seed       on what it puts into slots: takes the random key of a training step

one that adapts chosen layers

    configure  the knobs, and the adapted layers' names and widths -> the knobs of each layer
    tensors    what a layer's adapter is made of, as PEFT stores it: {variable: Tensor}
    merge      a parameter of a layer -> what it is with the adapter put into it
    PEFT       `Format`; with `to_peft` and `from_peft` the other half of adapter_config.json

where it needs them

    ON_EMBEDDING  module of what it puts on the embedding, with `attach`, `initial`, `tensors`,
                  `merge` and maybe `from_kernel`; without it the embedding is no target
    APART         is True if adapters of layers that transformers keeps as one cannot be joined to
                  the one of that layer, so that folders hold them apart, which PEFT cannot load
    EXPERTS       is True if it adapts experts too: what it puts into slots has `low_rank()`
    from_kernel   a layer's kernel -> the variables named by FROM_KERNEL, at first
    fixed         the knobs of a layer -> tensors of the folder that follow from them
    penalty       a model -> what is added to the mean loss while training
    SHARED        names of variables that have no layer axis (`SharedConstant`)

or one that fills a slot of the whole model

    SLOT        path of the slot, the one entry of its `Choice`
    stored      a model -> what a folder holds: {name: array}
    sizes       the knobs, the base's parameters, number of layers -> the shapes of that
    from_stored the inverse of `stored`: variables of the slot, of the method FINISHED, which has no
                network
    PEFT        as above

Variables that train are `AdapterParam`, others `AdapterConstant`; those of a stack of layers have
a leading axis. Layers of a stack that are not adapted have a constant of 0 which makes them the
base: their variables get no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.models.base import Change
from jaxtune.nn.linear import Linear, linears
from jaxtune.nn.params import AdapterConstant, AdapterParam, SeedKey

EMBEDDING = "embed"  # path of the token embedding

# Linear path ("layers.0.attn.q_proj") -> for each layer of its stack its knobs; None: not adapted.
# Of a method with a slot of the whole model: that slot's path -> its knobs, once.
Choice = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Adapters:
    """What is attached to a model.

    Attributes:
        method: its name in `peft.METHODS`.
        config: its knobs, of which the last word on dropout is here.
        choice: the adapted layers or the slot, with knobs of their own.
        saved, biases: parameters of the base that train beside it, by name.
        rows: the embedding or head of which single rows train, with their `tokens.Rows`.
    """

    method: str
    config: Any
    choice: Choice
    saved: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    rows: Choice = field(default_factory=dict)

    @property
    def layers(self) -> Choice:
        """All that has variables of its own."""
        return {**self.choice, **self.rows}


def weight_name(path: str) -> str:
    """Name of the matrix of a layer that may be adapted: [D_in, D_out], of the embedding [V, D]."""
    return f"{path}.table" if path == EMBEDDING else f"{path}.kernel"


@dataclass(frozen=True)
class Turns:
    """Layers that train in turn.

    Attributes:
        layers: K, how many at a time.
        steps: optimizer steps of a turn.
        active: number of the turn, int32 -> its layers, int32 [K], ascending.
    """

    layers: int
    steps: int
    active: Callable[[jax.Array], jax.Array]


class Tensor(NamedTuple):
    """A variable of one layer's adapter as PEFT stores it.

    Attributes:
        suffix: of its name, after the layer's.
        shape: ours.
        change: from theirs to ours, and back.
        axes: what each axis goes along: the layer's inputs ("in"), its outputs ("out"), the
            adapter's own features ("rank") or experts ("expert"); () if adapters are never joined.
        scaled: whether the layer's scale may be multiplied into it.
        absent: value along the outputs of a part without adapter; None: none does nothing.
    """

    suffix: str
    shape: tuple[int, ...]
    change: Change
    axes: tuple[str, ...] = ()
    scaled: bool = False
    absent: float | None = 0.0


@dataclass(frozen=True)
class Format:
    """A method's side of PEFT's adapter_config.json, common fields left out.

    Attributes:
        peft_type: PEFT's name of the method.
        defaults: value of each field that an adapter of ours leaves alone; another is refused.
        ignored: fields that say nothing about what the adapter computes.
        accepted: field -> values that make no difference to a trained adapter.
        has_layers: whether there is layers_to_transform; else every target is named in full.
        marks: fields by which it differs from other methods of the same type.
    """

    peft_type: str
    defaults: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    accepted: Mapping[str, tuple] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    has_layers: bool = True


def fill_slots(model: nnx.Module, adapters: Adapters, make: Callable[..., nnx.Module]) -> None:
    """Puts `make(layer, knobs of its stack's layers, knobs)` into the slots of adapted layers."""
    for path, linear in linears(model):
        if path in adapters.choice:
            linear.adapter = nnx.data(make(linear, adapters.choice[path], adapters.config))


def common(configs: Sequence[Any]) -> Any:
    """The knobs of the first adapted layer of a stack, for what its layers have in common."""
    return next(config for config in configs if config is not None)


def shapes(
    tensors: Callable[[Any, int, int], Mapping[str, Tensor]],
    configs: Sequence[Any],
    d_in: int,
    d_out: int,
) -> dict[str, tuple[int, ...]]:
    """Shape of each variable of a stack's adapter, without the layer axis.

    Layers of different ranks share an array of the largest; what exceeds a layer's own rank is
    zero and stays so, for its gradient is a product with zeros.
    """
    found: dict[str, tuple[int, ...]] = {}
    for config in configs:
        for leaf, tensor in (tensors(config, d_in, d_out) if config else {}).items():
            sizes = zip(found.get(leaf, tensor.shape), tensor.shape, strict=True)
            found[leaf] = tuple(max(pair) for pair in sizes)
    return found


def zeros(linear: Linear, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> AdapterParam:
    """A float32 variable for each matrix of a layer's kernel: of a stack, and of its experts."""
    stack = linear.kernel.get_value().shape[:-2]
    return AdapterParam(jnp.zeros((*stack, *shape)), axes=(*linear.axes[:-2], *axes))


def constant(linear: Linear) -> AdapterConstant:
    """A float32 number for each matrix of a layer's kernel: of a stack, and of its experts."""
    stack = linear.kernel.get_value().shape[:-2]
    return AdapterConstant(jnp.zeros(stack), axes=linear.axes[:-2])


def padded(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value in the corner of a zero array, float32."""
    array = np.zeros(shape, np.float32)
    array[tuple(slice(size) for size in value.shape)] = value
    return array


def kaiming(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """Uniform in +-1/sqrt(fan_in), torch's first value of a linear layer's weight; float32."""
    bound = fan_in**-0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def layer_key(key: jax.Array, index: int, stack: tuple[int, ...]) -> SeedKey:
    """The random key of slot `index`, for each layer of its stack another."""
    key = jax.random.fold_in(key, index)
    return SeedKey(jax.random.split(key, stack) if stack else key)


def dropped(x: jax.Array, rate: float, key: SeedKey) -> jax.Array:
    """Dropout: zero with probability `rate`, else divided by 1 - rate."""
    keep = jax.random.bernoulli(key.get_value(), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class Dropping(nnx.Module):
    """What goes into a slot and drops inputs while it trains.

    Attributes:
        dropout: the rate.
        scale: of each layer.
        key: what is dropped follows from it; None: nothing is.
    """

    dropout: float
    scale: AdapterConstant
    key: Any

    def seed(self, key: jax.Array, index: int) -> None:
        """Gives the layer its own key, if it has dropout."""
        if self.dropout:
            self.key = layer_key(key, index, self.scale.get_value().shape)


class LowRank(Dropping):
    """A layer plus a product of low rank."""

    def low_rank(self) -> tuple[jax.Array, jax.Array]:
        """A [..., D_in, R] and s B [..., R, D_out]; of experts with an axis over them."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        a, b = self.low_rank()
        if self.key is None:
            return linear.adapt(x, a, b)
        noisy = dropped(x, self.dropout, self.key)
        return linear.project(x) + linear.low_rank(noisy, a, b)


PROMPT = "prompt_embeddings"  # the one tensor of a prompt's folder

# What PEFT writes of the model for every prompt, and finds out itself where it is missing.
PROMPT_DEFAULTS = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "token_dim": None,
}
PROMPT_IGNORED = frozenset(("num_attention_heads", "num_layers", "token_dim"))


def finished(config: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """The knobs of a finished prompt, by its adapter_config.json.

    Args:
        config: the method's `Config`.
        fields: of adapter_config.json.

    Raises:
        ValueError: the number of virtual tokens is none.
    """
    count = fields.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise ValueError(f"num_virtual_tokens={count!r} is not a positive number")
    return config(num_virtual_tokens=count)
