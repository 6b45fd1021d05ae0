"""What trains outside of the layers, against PEFT: gradients with a tied and with its own head."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtune import peft, tree
from jaxtune.checkpoint.adapter import first_values, load_adapter
from jaxtune.nn.params import AdapterParam
from tests import oracle, tolerances
from tests.peft.test_lora import OBJECTIVE, padded_batch, torch_loss
from tests.peft.test_parity import TIED, their_model

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = [5, 90, 3]


@pytest.mark.parametrize(
    ("options", "sizes", "names"),
    [
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": IDS},
            TIED,
            {"embed.adapter.rows": "embed_tokens.token_adapter.trainable_tokens_delta.default"},
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            TIED,
            {
                "embed.adapter.a": "embed_tokens.lora_embedding_A.default",
                "embed.adapter.b": "embed_tokens.lora_embedding_B.default",
                "embed.adapter.magnitude": "embed_tokens.lora_magnitude_vector.default.weight",
            },
        ),
        pytest.param(
            {"target_modules": ["q_proj", "embed_tokens"]},
            {},
            {
                "embed.adapter.a": "embed_tokens.lora_embedding_A.default",
                "embed.adapter.b": "embed_tokens.lora_embedding_B.default",
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_peft(
    options: dict[str, Any], sizes: dict[str, Any], names: dict[str, str], tmp_path: Path
):
    hf = oracle.hf_llama(**sizes)
    model = their_model(hf, "LoraConfig", {"r": 2, **options}).train()
    model.save_pretrained(tmp_path)
    checkpoint = oracle.checkpoint_of(hf)
    loaded = oracle.load(checkpoint, layers="scan")
    shapes = loaded.skeleton.abstract()
    adapter = load_adapter(tmp_path, shapes, loaded.weights, loaded.stacks, base=checkpoint)

    def build() -> nnx.Module:
        made = loaded.skeleton.model(shapes)
        peft.attach(made, adapter.adapters)
        return made

    skeleton = tree.describe(build)
    rest = {n: leaf for n, leaf in skeleton.abstract().items() if n not in loaded.params}
    stored, where = adapter.params, (loaded.stacks, loaded.params)
    values = first_values(rest, adapter.adapters, *where, stored=stored, seed=0)
    batch = padded_batch(0, 3, 40, 97)

    @jax.jit
    def gradient(trainable: Any, frozen: Any) -> Any:
        def loss(trainable: Any) -> Any:
            micro = jax.tree.map(lambda leaf: leaf[0], batch)
            value, sums = OBJECTIVE(skeleton.model({**frozen, **trainable}), micro)
            return value / sums["weight"]

        return jax.grad(loss)(trainable)

    learning = {name: values.pop(name) for name in skeleton.select(AdapterParam)}
    grads = gradient(learning, loaded.params | values)
    torch_loss(model, batch).backward()
    theirs = dict(model.named_parameters())
    for ours, name in names.items():
        expected = theirs[f"base_model.model.model.{name}"].grad.numpy()
        expected = expected.T if ours.endswith((".a", ".b")) else expected
        assert np.abs(expected).max() > 0
        assert oracle.difference(grads[ours], expected) <= tolerances.GRADIENTS, ours
