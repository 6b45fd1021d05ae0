import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import tree
from jaxtune.models import llama
from jaxtune.nn.params import AdapterParam, Policy

CONFIG = llama.Config.from_hf(llama.TINY)


def build() -> nnx.Module:
    return llama.build(CONFIG, Policy(layers="scan"), nnx.Rngs(0))


def test_describing_makes_shapes_and_no_arrays():
    skeleton = tree.describe(build)
    abstract = skeleton.abstract()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract.values())
    assert abstract["layers.0.attn.k_proj.kernel"].shape == (3, 32, 16)
    assert abstract["embed.table"].shape == (259, 32)
    assert skeleton.axes("layers.0.attn.k_proj.kernel") == ("embed", "kv_heads")
    assert skeleton.select(AdapterParam) == set()
    assert tree.count(abstract) == sum(int(np.prod(leaf.shape)) for leaf in abstract.values())


def test_flatten_and_model_are_inverses():
    skeleton = tree.describe(build)
    params = {name: jnp.full(s.shape, 2.0) for name, s in skeleton.abstract().items()}
    again = tree.flatten(skeleton.model(params))
    assert again.keys() == params.keys()
    assert all(again[name] is params[name] for name in params)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("q_proj", True),
        ("attn.q_proj", True),
        ("layers.3.attn.q_proj", True),
        (r"layers\.\d\..*_proj", True),
        ("proj", False),
        ("n.q_proj", False),
        ("layers", False),
        ("q_proj(", False),
    ],
)
def test_matches(pattern: str, matched: bool):
    assert tree.matches(pattern, "layers.3.attn.q_proj") is matched
