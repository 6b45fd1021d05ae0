from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxtune import peft, tree
from jaxtune.errors import ConfigError
from jaxtune.models import llama
from jaxtune.nn.params import Policy
from jaxtune.peft import Targets
from jaxtune.schema import Peft

LINEARS = [f"attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def targeting(*names: str, exclude: tuple = (), layers: tuple = ()) -> Targets:
    return Targets(target_modules=names, exclude_modules=exclude, layers_to_transform=layers)


def model(layers: str) -> Any:
    """The shapes of tiny:llama, which has 3 layers."""
    config = llama.Config.from_hf(llama.TINY)
    policy = Policy(layers=layers)
    skeleton = tree.describe(lambda: llama.build(config, policy, nnx.Rngs(0)))
    return skeleton.model(skeleton.abstract())


MODELS = {layers: model(layers) for layers in ("scan", "unroll")}


def chosen(layers: str, targets: Targets) -> set[str]:
    """Names of the adapted layers, numbered in the whole model."""
    found, stacks = set(), MODELS[layers].stacks
    for path, flags in peft.choose(MODELS[layers], targets).items():
        names = peft.layer_names(path, stacks)
        found |= {name for (_, name), flag in zip(names, flags, strict=True) if flag}
    return found


def named(*rest: str, layers: tuple[int, ...] = (0, 1, 2)) -> set[str]:
    return {f"layers.{i}.{name}" for i in layers for name in rest}


@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (targeting("all-linear"), named(*LINEARS)),
        (targeting("q_proj", "down_proj"), named("attn.q_proj", "mlp.down_proj")),
        (targeting("attn.o_proj"), named("attn.o_proj")),
        (targeting("layers.1.mlp.up_proj"), named("mlp.up_proj", layers=(1,))),
        (
            targeting(r"layers\.[0-1]\.mlp\..*"),
            named(*LINEARS[4:], layers=(0, 1)),
        ),
        (targeting(r".*\.[qv]_proj"), named("attn.q_proj", "attn.v_proj")),
        (
            targeting("all-linear", exclude=("v_proj", r".*\.mlp\..*")),
            named("attn.q_proj", "attn.k_proj", "attn.o_proj"),
        ),
        (
            targeting("all-linear", exclude=("layers.0.attn.q_proj",)),
            named(*LINEARS) - {"layers.0.attn.q_proj"},
        ),
        (
            targeting("k_proj", layers=(0, 2)),
            named("attn.k_proj", layers=(0, 2)),
        ),
    ],
)
def test_chosen_layers(layers: str, targets: Targets, expected: set[str]):
    assert chosen(layers, targets) == expected


@pytest.mark.parametrize("layers", MODELS)
@pytest.mark.parametrize(
    ("targets", "messages"),
    [
        (
            targeting("q_porj"),
            ["q_porj", "did you mean q_proj?", "down_proj", "lm_head"],
        ),
        (targeting("q_proj", "c_attn"), ["('c_attn',) matches no layer"]),
        # PEFT's rule: a part of a name is no match.
        (targeting("proj"), ["('proj',) matches no layer"]),
        (targeting("q_proj["), ["matches no layer"]),
        (
            targeting("q_proj", exclude=("attn.q_proj",)),
            ["matches no layer that is left"],
        ),
        (
            targeting("q_proj", layers=(0, 3)),
            ["no layer 3", "layers 0 to 2"],
        ),
        (
            targeting("lm_head", layers=(0,)),
            ["lm_head is multiplied inside the loss"],
        ),
        (targeting("q_proj", "lm_head"), ["lm_head is multiplied inside the loss"]),
    ],
)
def test_what_matches_nothing_is_an_error(layers: str, targets: Targets, messages: list[str]):
    with pytest.raises(ConfigError) as caught:
        peft.choose(MODELS[layers], targets)
    assert all(message in str(caught.value) for message in messages), caught.value


def test_a_bias_of_the_embeddings_adapter_is_refused():
    options = Peft(lora_bias=True, target_modules=("embed", "q_proj"))
    with pytest.raises(
        ConfigError, match="take embed out of peft.target_modules, or leave lora_bi"
    ):
        peft.choose_adapters(MODELS["scan"], options)


def test_initial_values_do_not_depend_on_the_layout():
    options = Peft(rank=4, alpha=8.0, layers_to_transform=(0, 2))
    values: dict[str, dict[tuple, np.ndarray]] = {}
    for layers, shapes in MODELS.items():
        adapters, found = peft.choose_adapters(shapes, options), {}
        for path, configs in adapters.choice.items():
            for leaf, tail in (("a", (32, 4)), ("b", (4, 32)), ("scale", ())):
                name, n = f"{path}.adapter.{leaf}", len(configs)
                value = peft.initial_value(name, (n, *tail), adapters, shapes.stacks, 7)
                assert value.shape == (n, *tail) and value.dtype == np.float32
                for (_, layer), one in zip(
                    peft.layer_names(path, shapes.stacks), value, strict=True
                ):
                    found[layer, leaf] = one
        values[layers] = found
    for key, value in values["unroll"].items():
        np.testing.assert_array_equal(values["scan"][key], value)
    a = values["scan"]["layers.0.attn.q_proj", "a"]
    assert 0.9 * 32**-0.5 < np.abs(a).max() <= 32**-0.5
    assert not np.array_equal(a, values["scan"]["layers.2.attn.q_proj", "a"])
    assert not values["scan"]["layers.0.attn.q_proj", "b"].any()
    assert values["scan"]["layers.1.attn.q_proj", "scale"] == 0
    assert values["scan"]["layers.2.attn.q_proj", "scale"] == 2


def test_seed_changes_the_initial_values():
    adapters = peft.choose_adapters(MODELS["scan"], Peft(rank=4))
    name = "layers.0.attn.q_proj.adapter.a"
    first, second = (peft.initial_value(name, (3, 32, 4), adapters, (3,), seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
