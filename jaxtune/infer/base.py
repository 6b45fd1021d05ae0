"""A base model, read once, and what becomes of it with an adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxtune import models, peft, tree
from jaxtune.checkpoint import hf
from jaxtune.checkpoint.adapter import Adapter, first_values, load_adapter
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.log import warn
from jaxtune.models.base import Weight
from jaxtune.models.block import is_encoder_decoder
from jaxtune.nn import quantized
from jaxtune.nn.params import suited_policy
from jaxtune.nn.stack import stack_sizes
from jaxtune.sharding import rules
from jaxtune.tree import Params, Skeleton


@dataclass(frozen=True, eq=False)
class Base:
    """A model without adapters.

    Attributes:
        checkpoint: where it came from.
        weights: its family's table.
        stacks: sizes of its stacks of layers.
        mesh: the devices it is on.
        build: makes the model with what is attached to it, if anything is.
        skeleton: the model without arrays.
        params: its parameters, by name.
        made: skeletons of adapted models; the programs compiled for one serve alike adapters.
    """

    checkpoint: Checkpoint
    weights: Sequence[Weight]
    stacks: tuple[int, ...]
    mesh: Mesh
    build: Callable[[peft.Adapters | None], nnx.Module]
    skeleton: Skeleton
    params: Params
    made: list[tuple[peft.Adapters, Skeleton]] = field(default_factory=list)

    def read(self, folder: Path) -> Adapter:
        """An adapter for this model; WeightError if it does not fit."""
        shapes, where = self.skeleton.abstract(), (self.weights, self.stacks)
        adapter = load_adapter(folder, shapes, *where, base=self.checkpoint)
        for warning in adapter.warnings:
            warn(warning)
        return adapter

    def adapted(self, adapter: Adapter) -> tuple[Skeleton, Params]:
        """The model with an adapter; all parameters that it does not replace are shared."""
        skeleton = next((made for own, made in self.made if own == adapter.adapters), None)
        if skeleton is None:
            skeleton = tree.describe(lambda: self.build(adapter.adapters))
            self.made.append((adapter.adapters, skeleton))
        places = rules.placed(skeleton, self.mesh)
        missing = (places.keys() - self.params.keys()) | adapter.params.keys()
        rest = {name: places[name] for name in missing}
        stored = adapter.params
        values = first_values(
            rest, adapter.adapters, self.stacks, self.params, stored=stored, seed=0
        )
        return skeleton, self.params | values


def open_base(checkpoint: Checkpoint, dtype: str | None, mesh: Mesh) -> Base:
    """Describes a model and reads its weights.

    Args:
        checkpoint: the model on disk.
        dtype: of weights and computation; None: what suits the devices.
        mesh: the devices.
    """
    family, config = models.read_config(checkpoint.config, checkpoint.name)
    platform = mesh.devices.flat[0].platform
    # The kernels have no bias by distance.
    attention = "xla" if is_encoder_decoder(config) else None
    policy = suited_policy(
        platform, mesh=mesh, compute_dtype=dtype, remat="none", attention=attention
    )
    stacks = stack_sizes(config.num_layers, policy, config.layer_kinds)
    weights = family.weights(config)

    def build(adapters: peft.Adapters | None = None) -> nnx.Module:
        model: Any = family.build(config, policy, nnx.Rngs(0))
        quantized.put(model, kernels)
        if adapters is not None:
            peft.attach(model, adapters)
        return model

    kernels: quantized.Kernels = {}
    shapes = tree.describe(build).abstract()
    kernels = hf.quantized_kernels(checkpoint, weights, shapes, stacks)
    skeleton = tree.describe(build)
    params = hf.load_weights(checkpoint, weights, rules.placed(skeleton, mesh), stacks)
    return Base(checkpoint, weights, stacks, mesh, build, skeleton, params)
