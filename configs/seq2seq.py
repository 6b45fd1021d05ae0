"""An encoder-decoder (T5, Flan-T5, mT5) that learns to write targets for sources.

    python -m jaxtune.train --config=configs/seq2seq.py --config.model.path=google/flan-t5-base \
        --config.data.train=summaries.jsonl --config.train.output_dir=runs/summaries

Rows have a prompt and a completion, or any other conversation. docs/seq2seq.md has more.
"""

from jaxtune import config


def get_config():
    c = config.default()
    c.model.path = "google/flan-t5-base"
    c.objective.name = "seq2seq"
    c.peft.method = "lora"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.data.eval_fraction = 0.05
    c.data.packing = False
    c.data.pad_to = "longest"
    c.optim.learning_rate = 1e-3
    c.optim.warmup_ratio = 0.05
    c.train.num_epochs = 3.0
    c.train.micro_batch_size = 8
    c.eval.every_steps = 200
    c.checkpoint.every_steps = 200
    c.train.output_dir = "runs/seq2seq"
    return c
