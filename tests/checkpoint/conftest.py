"""Descriptions of small models, and models on disk, for the tests of this folder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.nn.params import Policy


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
        count = config.num_layers
        stacks = (count,) if layers == "scan" else (1,) * count
        return Described(family.WEIGHTS, skeleton.abstract(), stacks, skeleton)

    return run
