"""The description of a run: everything about its arrays except their values."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune import peft
from jaxtune.checkpoint.adapter import Adapter
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.distributed import batch_to_device, held_rows
from jaxtune.nn.params import LoadParam, Policy
from jaxtune.schema import RunConfig
from jaxtune.sharding import rules
from jaxtune.step import Objective
from jaxtune.tree import Params, Skeleton


@dataclass(frozen=True)
class Run:
    """Everything about a run's arrays except their values.

    Attributes:
        config: the resolved config.
        mesh: devices.
        checkpoint: the opened source of base weights.
        family: the model family's module, or what stands for it (`models.read_config`).
        model_config: the family's config.
        policy: how the model is computed.
        skeleton: the model without arrays.
        stacks: sizes of the model's stacks of layers.
        trainable, frozen: ShapeDtypeStructs with shardings, by name.
        taken: likewise, pairs whose products the base loses to the adapters.
        in_turn: likewise, whole stacks of layers that train in turn; `trainable` has as many of
            their layers as train at a time.
        turns: how they take turns.
        adapters: what is attached to the model, if anything is.
        imported: the adapter from which training continues, if any.
        objective: what is minimised.
    """

    config: RunConfig
    mesh: Mesh
    checkpoint: Checkpoint
    family: Any
    model_config: Any
    policy: Policy
    skeleton: Skeleton
    stacks: tuple[int, ...]
    trainable: Params
    frozen: Params
    taken: Params
    in_turn: Params
    turns: peft.Turns | None
    adapters: peft.Adapters | None
    imported: Adapter | None
    objective: Objective

    @property
    def variables(self) -> Params:
        """ShapeDtypeStructs of all variables of the model, by name."""
        return self.frozen | self.trainable | self.in_turn

    @property
    def loads(self) -> set[str]:
        """Names of the trained parameters whose gradients are the loads of experts."""
        return self.skeleton.select(LoadParam) if self.policy.counts_loads else set()

    def held_rows(self, rows: int) -> tuple[int, ...]:
        """Which rows of a batch of so many this process's devices hold."""
        return held_rows(rules.sharding((rows,), ("batch",), self.mesh), rows)

    def put(self, batch: Any, rows: int | None = None) -> Any:
        """A host batch of [..., B, T] arrays on the devices, its rows over the shards.

        Args:
            batch: the rows that `held_rows` names.
            rows: B in all processes; None: `batch` has them all.
        """
        count: int = jax.tree.leaves(batch)[0].shape[-2] if rows is None else rows
        held = self.held_rows(count)

        def put_one(array: np.ndarray) -> jax.Array:
            shape = (*array.shape[:-2], count, array.shape[-1])
            axes = (*(None,) * (array.ndim - 2), "batch", "length")
            where = rules.sharding(shape, axes, self.mesh, "batch")
            return batch_to_device(array, where, count, held)

        return jax.tree.map(put_one, batch)
