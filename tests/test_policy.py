import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxtune.errors import ConfigError
from jaxtune.models import llama
from jaxtune.policy import resolve_policy
from jaxtune.schema import Mesh, RunConfig
from jaxtune.sharding.mesh import make_mesh

MODEL = llama.Config.from_hf(llama.TINY)


def test_an_expert_axis_needs_experts_that_it_divides():
    config = RunConfig(mesh=Mesh(fsdp=1, expert=2))
    mesh = make_mesh(config.mesh.axes(), jax.devices()[:2])
    with pytest.raises(ConfigError, match=r"mesh.expert=2: the model has no experts"):
        resolve_policy(config, MODEL, mesh)
    fields = dataclasses.asdict(MODEL)
    with pytest.raises(ConfigError, match="has 3 experts"):
        resolve_policy(config, SimpleNamespace(**fields, num_experts=3), mesh)
    assert resolve_policy(config, SimpleNamespace(**fields, num_experts=4), mesh).mesh is mesh
