"""QLoRA: the run of configs/lora_llama.py on a base kept in four bits (nf4, double quantization).

    python -m jaxtune.train --config=configs/qlora_llama.py

The merged model at the end holds the dequantized base with the adapter added, which is what was
trained. docs/quantization.md says what each format costs and when to use it.
"""

from pathlib import Path
from typing import Any

from jaxtune import config


def get_config():
    c: Any = config.load_file(str(Path(__file__).with_name("lora_llama.py")))
    c.quant.format = ("nf4",)
    c.train.output_dir = "runs/qlora_llama"
    return c
