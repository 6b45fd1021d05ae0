"""A classifier of texts, from an encoder (BERT, RoBERTa, ELECTRA) or a language model.

    python -m jaxtune.train --config=configs/classify.py --config.model.path=my-bert \
        --config.data.train=reviews.csv --config.train.output_dir=runs/reviews

Rows have a `text` and a `label`; a tenth of them is held out and measured. docs/labels.md has more.
"""

from jaxtune import config


def get_config():
    c = config.default()
    c.model.path = "my-bert"
    c.objective.name = "sequence_classification"
    c.peft.method = "full"
    c.data.eval_fraction = 0.1
    c.data.max_seq_len = 256
    c.optim.learning_rate = 1e-4
    c.optim.warmup_ratio = 0.1
    c.optim.weight_decay = 0.01
    c.train.num_epochs = 3.0
    c.train.micro_batch_size = 8
    c.eval.every_steps = 100
    c.checkpoint.every_steps = 100
    c.train.output_dir = "runs/classify"
    return c
