"""The merge command: several LoRA adapters of one base into one, or an adapter out of a model.

python -m jaxtune.merge --adapters=a,b --weights=0.7,0.3 --how=ties --density=0.5 --out=merged
python -m jaxtune.merge --unmerge=my-tuned-model --adapters=a --out=base

The result of the first is a PEFT folder like the others: it can be generated with, trained further,
combined again or merged into the base. Weights may be negative, which takes an adapter out again.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
from ml_dtypes import finfo

from jaxtune import data, models
from jaxtune.checkpoint.adapter_merge import merge_adapters
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.checkpoint.merging import distances, unmerged
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.errors import ConfigError, run_command
from jaxtune.log import info
from jaxtune.peft.combine import COMBINATIONS, Knobs


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; ConfigError for what it does not understand."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.merge",
        description="Combines LoRA adapters of one base.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--adapters", required=True, help="PEFT LoRA folders, separated by commas")
    add("--weights", help="factor of each, separated by commas; default: 1 / their number")
    add("--out", type=Path, required=True, help="folder to write")
    add("--how", choices=COMBINATIONS, default="cat", help="default cat: the exact weighted sum")
    add("--rank", type=int, help="rank of the result of svd; default: that of the sum")
    add("--density", type=float, help="share of entries that ties and dare keep")
    add("--unmerge", help="a merged model, out of which the one adapter is taken instead")
    add("--base", help="model with which the result of --unmerge is compared")
    add("--seed", type=int, help="of dare's choices (default 0)")

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message} - see python -m jaxtune.merge --help")

    parser.error = fail
    arguments = parser.parse_args(argv)
    folders = [Path(folder) for folder in arguments.adapters.split(",") if folder]
    if not folders:
        fail("--adapters is empty")
    weights = [1 / len(folders)] * len(folders)
    try:
        if arguments.weights is not None:
            weights = [float(weight) for weight in arguments.weights.split(",")]
    except ValueError:
        fail(f"--weights={arguments.weights} are not numbers")
    if len(weights) != len(folders):
        fail(f"{len(folders)} adapters, but {len(weights)} weights")
    needs_density = arguments.how in ("ties", "dare", "dare_ties")
    if needs_density != (arguments.density is not None):
        fail(f"--density goes with ties, dare and dare_ties, and --how={arguments.how}")
    if needs_density and not 0 < arguments.density <= 1:
        fail(f"--density={arguments.density} must be above 0 and at most 1")
    if arguments.seed is not None and not arguments.how.startswith("dare"):
        fail(f"--seed={arguments.seed} goes with dare and dare_ties, and --how={arguments.how}")
    if arguments.rank is not None and (arguments.how != "svd" or arguments.rank < 1):
        fail(f"--rank={arguments.rank} goes with --how=svd and is at least 1")
    if arguments.unmerge is not None and (len(folders) > 1 or arguments.how != "cat"):
        fail("--unmerge takes one adapter out, and reads --base and --out only")
    if arguments.unmerge is not None and arguments.weights is not None:
        fail("--unmerge does not read --weights: it takes out all that was merged")
    if arguments.unmerge is None and arguments.base is not None:
        fail("--base goes with --unmerge")
    arguments.adapters, arguments.weights = folders, weights
    return arguments


def unmerge(model: str, adapter: Path, out: Path, base: str | None = None) -> None:
    """Writes a merged model without its adapter, and says how far it may be from its base.

    Args:
        model: the merged model, as for model.path.
        adapter: PEFT folder of what was merged into it.
        out: a new folder, or an earlier export, which is replaced.
        base: a model to compare the result with.

    Raises:
        ConfigError, WeightError: see `checkpoint.merging.unmerged`.
    """
    merged = open_checkpoint(model)
    result = unmerged(merged, adapter)
    family, config = models.read_config(merged.config, model)
    tokenizer = data.load_tokenizer(merged.tokenizer_source)
    where = (family.weights(config), (config.num_layers,))
    save_model(out, {}, result, *where, tokenizer=tokenizer)
    unit = max(float(finfo(tensor.dtype).eps) for tensor in merged.tensors.values()) / 2
    info(f"model: {out}, each entry within {unit:.1e} (|merged| + |base|) of the base's")
    if base is not None:
        found = distances(open_checkpoint(str(out)), open_checkpoint(base))
        worst = max(found, key=lambda name: found[name])
        info(f"differs from {base} by {found[worst]:.1e} of a tensor's norm at most ({worst})")


def main() -> None:
    """Reads the command line and combines, or takes out."""
    arguments = parse_arguments(sys.argv[1:])
    if arguments.unmerge is not None:
        unmerge(arguments.unmerge, arguments.adapters[0], arguments.out, arguments.base)
        return
    knobs = Knobs(
        arguments.rank or sys.maxsize,
        arguments.density or 1.0,
        np.random.default_rng(arguments.seed or 0),
    )
    merge_adapters(
        arguments.adapters, arguments.weights, arguments.out, how=arguments.how, knobs=knobs
    )
    info(f"adapter: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
