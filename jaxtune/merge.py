"""The merge command: several LoRA adapters of one base into one.

python -m jaxtune.merge --adapters=a,b --weights=0.7,0.3 --how=ties --density=0.5 --out=merged

The result is a PEFT folder like the others: it can be generated with, trained further, combined
again or merged into the base. Weights may be negative, which takes an adapter out again.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxtune.checkpoint.adapter_merge import merge_adapters
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
    add("--seed", type=int, default=0, help="of dare's choices (default 0)")

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
    if arguments.rank is not None and (arguments.how != "svd" or arguments.rank < 1):
        fail(f"--rank={arguments.rank} goes with --how=svd and is at least 1")
    arguments.adapters, arguments.weights = folders, weights
    return arguments


def main() -> None:
    """Reads the command line and combines."""
    arguments = parse_arguments(sys.argv[1:])
    knobs = Knobs(
        arguments.rank or sys.maxsize,
        arguments.density or 1.0,
        np.random.default_rng(arguments.seed),
    )
    merge_adapters(
        arguments.adapters, arguments.weights, arguments.out, how=arguments.how, knobs=knobs
    )
    info(f"adapter: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
