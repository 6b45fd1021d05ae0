"""StableLM 1 and 2: layer norms, a quarter of each head is rotated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxtune.errors import WeightError
from jaxtune.models import llama_layout
from jaxtune.models.block import Block, ParallelBlock
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.nn.params import Policy

weights = llama_layout.weights

TINY = llama_layout.TINY | {
    "architectures": ["StableLmForCausalLM"],
    "model_type": "stablelm",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "hidden_size": 64,
}
# stablelm-3b-4e1t and stablelm-2-1_6b.
SIZES = {
    "1.6b": llama_layout.sized(TINY, (2048, 5632, 24, 32, 32), vocab_size=100352)
    | {"max_position_embeddings": 4096, "use_qkv_bias": True},
    "3b": llama_layout.sized(TINY, (2560, 6912, 32, 32, 32), vocab_size=50304)
    | {"max_position_embeddings": 4096},
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder read from a StableLM config.json."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads config.json; normalised queries and keys (StableLM 2 12B) are refused."""
        if hf.get("qk_layernorm"):
            raise WeightError("config.json: qk_layernorm is not supported for stablelm")
        parallel = hf.get("use_parallel_residual", False)
        return cls(
            **llama_layout.fields(
                hf,
                rotary=llama_layout.partial_rotary(hf, 0.25),
                norm="layer",
                norm_eps=hf.get("layer_norm_eps", 1e-5),
                norms=("attn_norm",) if parallel else ("attn_norm", "mlp_norm"),
                qkv_bias=hf.get("use_qkv_bias", False),
            )
        )


def build(config: Config, policy: Policy, rngs: nnx.Rngs) -> Decoder:
    """The model; attention and MLP share a norm where they are parallel."""
    block = Block if "mlp_norm" in config.norms else ParallelBlock
    return Decoder(config, policy, rngs, block=block)
