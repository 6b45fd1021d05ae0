"""Generation: prompts in, answers out, for loaded models and for a training run's live weights.

load(path, ...)             a model on disk with its tokenizer: logits, generate
generate(skeleton, ...)     token ids -> token ids, with parameters given as a flat dictionary
make_sampling(...)          temperature, top-k, top-p, repetition penalty, checked
stop_ids(checkpoint, ...)   tokens that end an answer
"""

from jaxtune.infer.engine import generate
from jaxtune.infer.sampling import Sampling, make_sampling
from jaxtune.infer.session import Prompt, Session, load, stop_ids

__all__ = ["Prompt", "Sampling", "Session", "generate", "load", "make_sampling", "stop_ids"]
