"""Descriptions of small models, and models on disk, for the tests of this folder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.nn.params import Policy
from jaxtune.nn.stack import stack_sizes


class Described(NamedTuple):
    """What loading and saving need to know of a model."""

    weights: tuple
    abstract: dict[str, Any]
    stacks: tuple[int, ...]
    skeleton: tree.Skeleton


@pytest.fixture
def describe() -> Callable[..., Described]:
    """(checkpoint, "scan" or "unroll") -> its description."""

    def run(checkpoint: Checkpoint, layers: str) -> Described:
        family = models.family(checkpoint.config["model_type"])
        config = family.Config.from_hf(checkpoint.config)
        policy = Policy(layers=layers)
        skeleton = tree.describe(lambda: family.build(config, policy, nnx.Rngs(0)))
        stacks = stack_sizes(config.num_layers, policy, config.layer_kinds)
        return Described(family.weights(config), skeleton.abstract(), stacks, skeleton)

    return run
