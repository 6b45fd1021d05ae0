from types import SimpleNamespace

import jax
import pytest

from jaxtune.errors import ConfigError
from jaxtune.models import deepseek_v2, llama, mixtral
from jaxtune.policy import require_room, resolve_policy
from jaxtune.schema import Data, Mesh, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh

MODEL = llama.Config.from_hf(llama.TINY)


def test_an_expert_axis_needs_experts_that_it_divides():
    config = RunConfig(mesh=Mesh(fsdp=1, expert=2))
    mesh = make_mesh(config.mesh.axes(), jax.devices()[:2])
    with pytest.raises(ConfigError, match=r"mesh.expert=2: the model has no experts"):
        resolve_policy(config, MODEL, mesh)
    fields = vars(MODEL)
    with pytest.raises(ConfigError, match="has 3 experts"):
        resolve_policy(config, SimpleNamespace(**fields, num_experts=3), mesh)
    assert resolve_policy(config, SimpleNamespace(**fields, num_experts=4), mesh).mesh is mesh


@pytest.mark.parametrize(
    ("virtual", "max_tokens", "message"),
    [
        (9, 99, "more than half of a row would be the 9 virtual tokens"),
        (0, 15, "learned 20 positions, of which the prefix leaves 15"),
    ],
)
def test_prompts_and_prefixes_leave_room_for_rows(virtual: int, max_tokens: int, message: str):
    sizes = SimpleNamespace(position_rows=20, max_positions=20)
    config = RunConfig(data=Data(max_seq_len=16))
    room = SimpleNamespace(config=sizes, num_virtual_tokens=8, max_tokens=8)
    require_room(config, room)
    model = SimpleNamespace(config=sizes, num_virtual_tokens=virtual, max_tokens=max_tokens)
    with pytest.raises(ConfigError, match=message):
        require_room(config, model)


def test_the_balance_of_experts_needs_experts_and_layers_that_pass_it_on():
    balanced = Train(router_aux_loss=0.01)
    one = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="router_aux_loss=0.01: the model has no experts"):
        resolve_policy(RunConfig(train=balanced), MODEL, one)
    mixture = mixtral.Config.from_hf(mixtral.TINY)
    assert resolve_policy(RunConfig(train=balanced), mixture, one).imbalance
    for config, mesh in (
        (RunConfig(train=balanced, mesh=Mesh(stage=3)), make_mesh({"stage": 3}, jax.devices()[:3])),
        (RunConfig(train=balanced, peft=Peft(method="lisa")), one),
    ):
        with pytest.raises(ConfigError, match="sums over all layers"):
            resolve_policy(config, mixture, mesh)


def test_latent_attention_has_no_prefix():
    latent = deepseek_v2.Config.from_hf(deepseek_v2.TINY)
    one = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="method=prefix: .* one latent vector"):
        resolve_policy(RunConfig(peft=Peft(method="prefix")), latent, one)


@pytest.mark.parametrize("method", ["lisa", "full"])
def test_layers_that_differ_are_told_by_what_they_differ_in(method: str):
    hf = deepseek_v2.TINY | {"num_hidden_layers": 4}
    config = RunConfig(peft=Peft(method=method), mesh=Mesh(stage=2 if method == "full" else 1))
    mesh = make_mesh({"stage": config.mesh.stage}, jax.devices()[: config.mesh.stage])
    with pytest.raises(ConfigError, match="differ in experts, which some do not have"):
        resolve_policy(config, deepseek_v2.Config.from_hf(hf), mesh)
