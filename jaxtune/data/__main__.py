"""`python -m jaxtune.data`: what a config would train on, before it does.

    python -m jaxtune.data --config=configs/lora_llama.py
    python -m jaxtune.data --config=configs/lora_llama.py --samples=5 --export=rows.jsonl

Prints what was read, left out and cut, the lengths of rows, the padding of an epoch, duplicates,
and some rows; tokens that carry loss are green, or in ⟦ ⟧ where there are no colours. Of a stream
only the first units are looked at. No weights are read.

    --samples=N        rows shown (default 3), from all over the data
    --histogram=FILE   the lengths as a PNG
    --export=FILE      all tokenized rows as JSON lines: tokens, trained
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxtune import config, data
from jaxtune.checkpoint.label_head import with_head
from jaxtune.checkpoint.labels import labelling_of, with_labels
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.data import look
from jaxtune.errors import ConfigError, run_command
from jaxtune.log import info
from jaxtune.schema import RunConfig

UNITS = 8  # of a stream


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--histogram", type=Path)
    parser.add_argument("--export", type=Path)
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error


def _load(cfg: RunConfig) -> tuple[Any, Any, data.Dataset | None]:
    """Tokenizer, training and held-out data."""
    checkpoint = open_checkpoint(cfg.model.path, cfg.model.revision)
    cfg = with_labels(cfg, checkpoint)
    headed = with_head(checkpoint, cfg.objective, cfg.train.seed)
    source = cfg.model.tokenizer or checkpoint.tokenizer_source
    tokenizer = data.load_tokenizer(
        source, template=cfg.data.template, enable_thinking=cfg.data.enable_thinking
    )
    sets = data.load(
        cfg.data,
        tokenizer,
        seed=cfg.train.seed,
        vocab_size=_vocab_size(checkpoint.config),
        num_virtual_tokens=cfg.peft.prompt_tokens,
        labelling=labelling_of(headed),
        paired=cfg.objective.is_paired,
    )
    return tokenizer, *sets


def _vocab_size(hf: dict[str, Any]) -> int:
    """Of a config.json; ChatGLM's has a name of its own for it."""
    return hf["vocab_size"] if "vocab_size" in hf else hf["padded_vocab_size"]


def main() -> None:
    """Reads the command line, prints the report."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        info((__doc__ or "") + "\n" + config.usage("jaxtune.data [options]"))
        return
    options, rest = _options(sys.argv[1:])
    cfg = config.parse_arguments(rest)
    tokenizer, found, held_out = _load(cfg)
    info(f"training data: {found.stats}")
    if held_out is not None:
        info(f"held-out data: {held_out.stats}")
    seed = cfg.train.seed
    table = found.rows if isinstance(found, data.Dataset) else found.read(0, UNITS, seed)
    info(f"lengths in tokens, {len(table)} rows:\n{look.histogram(table)}")
    info(f"an epoch: {look.padding(table, cfg.data, seed)}")
    info(f"duplicates: {look.duplicates(table)} rows have the tokens of an earlier one")
    for n in range(min(options.samples, len(table))):
        index = n * len(table) // options.samples
        info(f"row {index}:\n{look.show(table[index], tokenizer, sys.stdout.isatty())}")
    if options.histogram:
        look.draw(table, options.histogram)
        info(f"lengths: {options.histogram}")
    if options.export:
        look.export(table, options.export)
        info(f"rows: {options.export}")


if __name__ == "__main__":
    run_command(main)
