"""From data files to batches.

tokenizer = load_tokenizer(path)
train, held_out = load(cfg.data, tokenizer, seed=0, vocab_size=49152)
loader = make_loader(train, cfg.data, rows=4, accumulation=2, seed=0)
for batch, position in loader.batches(saved_position):
    ...

record --formats--> Example --tokenize--> TokenRow --packing, loader--> TokenBatch [A, B, T]
"""

from jaxtune.data.batch import Batch, PairBatch, TokenBatch, TokenRow
from jaxtune.data.dataset import Dataset, Stats, load
from jaxtune.data.examples import Example, Message
from jaxtune.data.labelling import Labelling
from jaxtune.data.lanes import Lanes
from jaxtune.data.loader import Loader, make_loader
from jaxtune.data.pairs import source_ids
from jaxtune.data.stream import Stream
from jaxtune.data.tokenize import prompt_ids, stop_ids
from jaxtune.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Labelling",
    "Lanes",
    "Loader",
    "Message",
    "PairBatch",
    "Stats",
    "Stream",
    "TokenBatch",
    "TokenRow",
    "load",
    "load_tokenizer",
    "make_loader",
    "prompt_ids",
    "source_ids",
    "stop_ids",
]
