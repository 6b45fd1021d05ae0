"""`python -m jaxtune.plan`: the step that a config would train, compiled for devices not at hand.

    python -m jaxtune.plan --config=configs/lora_llama.py --topology=v5e:4x4
    python -m jaxtune.plan --config=configs/lora_llama.py --topology=h100:8 --json
    python -m jaxtune.plan --config=configs/lora_llama.py --topology=v5e:1x1 --fit=max_seq
    python -m jaxtune.plan --config=configs/lora_llama.py --topology=v5e:4x4 --search

Everything up to the weights is `jaxtune.train`'s own: the config is checked, the run described,
`model.remat=auto` decided by compiling. Nothing is read but config.json; a size such as
`--config.model.path=llama:8b` needs no files at all. Memory is the compiler's account for one
device; times are estimates. Exit code 0: the step fits; 6: it does not.

    --topology=NAME   v5e:4x4 and other TPU slices, h100:8 and other GPUs, cpu:8
    --json            the same numbers for programs
    --fit=max_seq     the longest rows that fit, --fit=max_batch: the most rows of a micro-batch
    --search          the fastest mesh, recomputation and micro-batch for the config's global batch,
                      of the --compiles=N (default 8) layouts that look best before compiling
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from jaxtune import config, fit
from jaxtune.errors import ConfigError, run_command
from jaxtune.log import info
from jaxtune.planning.account import plan
from jaxtune.planning.largest import QUANTITIES, largest
from jaxtune.planning.search import search
from jaxtune.planning.topology import topology_devices


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", choices=list(QUANTITIES))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--compiles", type=int, default=None)
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if options.topology is None:
        raise ConfigError("--topology=NAME is missing - e.g. --topology=v5e:4x4, h100:8 or cpu:8")
    if options.fit and options.search:
        raise ConfigError("--fit and --search are two questions - ask one at a time")
    if options.compiles is not None and (not options.search or options.compiles < 1):
        raise ConfigError("--compiles=N, at least 1, says how many layouts --search compiles")
    return options, rest


def main() -> None:
    """Reads the command line, prints the plan."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        info((__doc__ or "") + "\n" + config.usage("jaxtune.plan --topology=NAME [options]"))
        return
    options, rest = _options(sys.argv[1:])
    cfg = config.parse_arguments(rest)
    found: Any
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is not the result
        devices = topology_devices(options.topology)
        if options.search:
            found = search(cfg, options.topology, devices, options.compiles or 8)
        elif options.fit:
            found = largest(cfg, options.topology, devices, options.fit)
        else:
            found = plan(cfg, options.topology, devices)
    print(json.dumps(dataclasses.asdict(found)) if options.json else found.table())
    if not options.search and not options.fit:
        fit.check_fits(found.total, found.limit, found.device)


if __name__ == "__main__":
    run_command(main)
