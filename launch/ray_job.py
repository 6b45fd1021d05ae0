"""Trains on the nodes of a Ray cluster, one process for each.

    python launch/ray_job.py --nodes 2 --resource GPU=8 -- --config=configs/lora.py ...

jaxtune must be installed on all nodes, and its output folder be on a file system that they share.
The exit code is that of the first process that failed.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


def main() -> int:
    """Takes the nodes, starts a process on each and waits for them; returns the exit code."""
    options = parse_arguments(sys.argv[1:])
    name, _, amount = options.resource.partition("=")
    resources = {name: float(amount)}
    ray.init(address="auto")
    group = placement_group([{"CPU": 1} | resources] * options.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(node: int, function: Callable):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        taken = {"num_gpus": resources["GPU"]} if name == "GPU" else {"resources": resources}
        options = {"max_retries": 0, "num_cpus": 1, "scheduling_strategy": strategy} | taken
        return ray.remote(**options)(function)

    address = ray.get(on(0, free_address).remote())
    running = [
        on(node, train).remote(address, options.nodes, node, options.training)
        for node in range(options.nodes)
    ]
    first = 0
    while running:
        (done,), running = ray.wait(running, num_returns=1)
        first = first or ray.get(done)
    return first


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line; what follows `--` is for the training command."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, required=True, help="how many")
    parser.add_argument("--resource", default="GPU=8", help="what each has: GPU=8, TPU=4")
    options = parser.parse_args(arguments[:cut])
    options.training = arguments[cut + 1 :]
    return options


def free_address() -> str:
    """A port of this node, for process 0."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{get_node_ip_address()}:{free.getsockname()[1]}"


def train(address: str, count: int, number: int, arguments: list[str]) -> int:
    """Runs the training command as one of the processes; its exit code."""
    place = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }
    command = [sys.executable, "-m", "jaxtune.train", *arguments]
    code = subprocess.run(command, env=os.environ | place).returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
