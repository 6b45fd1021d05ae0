"""Random tiny Llamas that transformers and jaxtune compute alike, and how to compare results."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import models, peft, tree
from jaxtune.checkpoint.hf import load_weights, quantized_kernels
from jaxtune.checkpoint.safetensors import read_folder, read_tensor
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.models.base import Weight
from jaxtune.nn import quantized
from jaxtune.nn.params import AdapterParam, Policy
from jaxtune.nn.stack import stack_sizes
from jaxtune.peft import Adapters
from jaxtune.schema import Peft

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Loaded(NamedTuple):
    """A model in jaxtune."""

    skeleton: tree.Skeleton
    params: tree.Params
    stacks: tuple[int, ...]
    weights: tuple[Weight, ...]
    forward: Callable[..., jax.Array]  # (params, tokens, positions, segment ids) -> logits, jitted


def hf_llama(seed: int = 0, **changes: Any) -> Any:
    """A transformers Llama whose every parameter, norms and biases too, is random."""
    import transformers

    config = transformers.LlamaConfig(**SIZES | changes, attn_implementation="eager")
    return randomized(transformers.LlamaForCausalLM(config), seed)


def hf_model(fields: Mapping[str, Any], seed: int = 0) -> Any:
    """The torch model of a config.json, every parameter random."""
    import transformers

    from tests.models import transcribed

    if fields["model_type"] in transcribed.MODELS:
        return randomized(transcribed.Transcribed(fields), seed)
    config = transformers.AutoConfig.for_model(**fields)
    # Falcon's eager attention adds ALiBi twice.
    way = "sdpa" if fields.get("alibi") else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=way)
    return randomized(model, seed)


def randomized(model: Any, seed: int = 0) -> Any:
    """A torch model with other parameters: matrices that keep the size of what goes through."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def checkpoint_of(model: Any) -> Checkpoint:
    """A transformers model in memory, as an opened checkpoint."""
    config = model.config.to_dict()
    state = published_names(model.state_dict(), model)
    tensors = {name: tensor.detach().numpy() for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    return Checkpoint("random", Path("random"), config, None, infos, lambda name: tensors[name])


def assert_same_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Whether a folder has the config and, to the bit, the tensors of a checkpoint."""
    written = json.loads((folder / "config.json").read_text())
    assert written == json.loads(json.dumps(checkpoint.config))
    locations = read_folder(folder)
    assert set(locations) == set(checkpoint.tensors)
    for tensor, location in locations.items():
        np.testing.assert_array_equal(read_tensor(location), checkpoint.read(tensor), tensor)


def published_names(tensors: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A torch model's tensors by their names in files: experts one by one, some names others."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    return revert_weight_conversion(model, dict(tensors))


def load(checkpoint: Checkpoint, **policy: Any) -> Loaded:
    """The same model in jaxtune, quantized weights as they are stored; `policy` are its fields."""
    family, config = models.read_config(checkpoint.config, checkpoint.name)
    stacks = stack_sizes(config.num_layers, Policy(**policy), config.layer_kinds)
    weights = family.weights(config)

    def build() -> nnx.Module:
        return family.build(config, Policy(**policy), nnx.Rngs(0))

    def build_stored() -> nnx.Module:
        model = build()
        quantized.put(model, kernels)
        return model

    shapes = tree.describe(build).abstract()
    kernels = quantized_kernels(checkpoint, weights, shapes, stacks)
    skeleton = tree.describe(build_stored)
    params = load_weights(checkpoint, weights, skeleton.abstract(), stacks)

    @jax.jit
    def forward(params: tree.Params, tokens: Any, positions: Any, segments: Any) -> jax.Array:
        model = skeleton.model(params)
        return model.logits(model.hidden(tokens, positions, segments)[0])

    return Loaded(skeleton, params, stacks, weights, forward)


class Adapted(NamedTuple):
    """A model with adapters."""

    skeleton: tree.Skeleton
    trainable: tree.Params
    frozen: tree.Params
    adapters: Adapters


def adapt(loaded: Loaded, peft_options: Peft, *, b_std: float = 0.1) -> Adapted:
    """Puts LoRA on a model: A as the method starts it, B and its bias normal (of all layers)."""
    abstract = loaded.skeleton.abstract()
    adapters = peft.choose_adapters(loaded.skeleton.model(abstract), peft_options)

    def build() -> nnx.Module:
        model = loaded.skeleton.model(abstract)
        peft.attach(model, adapters)
        return model

    skeleton = tree.describe(build)
    params = dict(loaded.params)
    random = np.random.default_rng(5)
    for name in sorted(set(skeleton.variables) - set(params)):
        shape = skeleton.abstract()[name].shape
        value = peft.initial_value(name, shape, adapters, loaded.stacks, seed=0)
        if name.endswith((".b", ".bias")):
            value = random.normal(0, b_std, shape).astype(np.float32)
        params[name] = jnp.asarray(value)
    learning = skeleton.select(AdapterParam)
    trainable = {name: array for name, array in params.items() if name in learning}
    frozen = {name: array for name, array in params.items() if name not in learning}
    return Adapted(skeleton, trainable, frozen, adapters)


def logits(
    loaded: Loaded, tokens: np.ndarray, positions: Any = None, segments: Any = None
) -> np.ndarray:
    """float32 [B, T, V]; by default every row is one example."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(loaded.forward(loaded.params, tokens, positions, segments))


def model_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of a model of ours, whose every row is one example."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(model.logits(model.hidden(tokens, positions, None)[0]))


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of a torch model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def hf_gradients(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of a torch model's mean loss, by the names of its parameters in files."""
    import torch

    ids = torch.tensor(tokens).long()
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.numpy() for name, grad in published_names(found, model).items()}


def random_tokens(seed: int, *shape: int, vocab: int = SIZES["vocab_size"]) -> np.ndarray:
    """int32 ids."""
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def difference(value: Any, expected: Any) -> float:
    """Largest difference, divided by the largest expected value."""
    value, expected = (np.asarray(x, np.float64) for x in (value, expected))
    assert value.shape == expected.shape
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-30))
