"""LoRA on any model and file, named on the command line; a start for a config of your own.

    python -m jaxtune.train --config=configs/lora.py --config.model.path=my-model \
        --config.data.train=my_data.jsonl --config.train.output_dir=runs/mine
"""

from jaxtune import config


def get_config():
    c = config.default()
    c.model.path = "my-model"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.data.eval_fraction = 0.02
    c.data.max_seq_len = 1024
    c.data.packing = True
    c.optim.learning_rate = 2e-4
    c.optim.schedule = "linear"
    c.optim.warmup_ratio = 0.03
    c.train.num_epochs = 1.0
    c.train.micro_batch_size = 4
    c.eval.every_steps = 100
    c.checkpoint.every_steps = 100
    c.train.output_dir = "runs/lora"
    return c
