"""Continued pretraining: every token of texts is trained, documents follow each other with EOS.

    python -m jaxtune.train --config=configs/pretrain.py --config.model.path=my-model \
        --config.data.train=texts --config.train.output_dir=runs/pretrained

`texts` is a folder of .txt files (each one document) or of files whose rows have a field `text`.
"""

from jaxtune import config


def get_config():
    c = config.default()
    c.model.path = "my-model"
    c.peft.method = "full"
    c.data.text_rows = "file"
    c.data.max_line_bytes = 256 << 20  # of a document
    c.data.train_on = "all"
    c.data.max_seq_len = 2048
    c.data.packer = "concat"  # rows are full, what is cut goes on in the next one
    c.data.isolated = True  # False: documents of a row see each other
    c.optim.learning_rate = 1e-5
    c.optim.schedule = "cosine"
    c.optim.warmup_ratio = 0.01
    c.optim.weight_decay = 0.1
    c.optim.b2 = 0.95
    c.train.micro_batch_size = 1
    c.train.gradient_accumulation_steps = 8
    c.train.output_dir = "runs/pretrain"
    return c
