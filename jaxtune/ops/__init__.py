"""Arrays in, arrays out: the numerical operations that layers are made of.

Operations with several implementations are folders with one public function; the rest is one file
each. None of them knows modules or configs.
"""

from jaxtune.ops.attention import attention
from jaxtune.ops.attention.cached import cached_attention
from jaxtune.ops.attention.ring import attend as ring_attention
from jaxtune.ops.attention.ulysses import attend as ulysses_attention
from jaxtune.ops.cross_entropy import Logits, Penalties, cross_entropy, token_logprobs
from jaxtune.ops.matmul import adapted_matmul, dot, grouped_matmul, matmul
from jaxtune.ops.norm import layer_norm, rms_norm
from jaxtune.ops.rotate import rotate
from jaxtune.ops.swiglu import swiglu

__all__ = [
    "Logits",
    "Penalties",
    "adapted_matmul",
    "attention",
    "cached_attention",
    "cross_entropy",
    "dot",
    "grouped_matmul",
    "layer_norm",
    "matmul",
    "ring_attention",
    "rms_norm",
    "rotate",
    "swiglu",
    "token_logprobs",
    "ulysses_attention",
]
