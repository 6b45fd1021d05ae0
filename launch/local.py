"""Trains with several processes on this machine.

    python launch/local.py --processes 2 -- --config=configs/lora.py --config.data.train=rows.jsonl

Every line of a process begins with its number, or goes to LOG_DIR/process-<number>.log. SIGTERM and
Ctrl-C are passed on: all processes save the same step and end. When one fails, the others have time
to notice and say so, then they are ended. The exit code is that of the first that failed, 128 + N
if signal N ended it.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

NOTICE_SECONDS = 25  # for the others to notice by themselves that one has failed
END_SECONDS = 10  # for a process that was told to end


def main() -> int:
    """Starts the processes and waits for them; returns the exit code."""
    options = parse_arguments(sys.argv[1:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(options, number, address) for number in range(options.processes)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: tell(processes, received))
    readers = [follow(process, number) for number, process in enumerate(processes)]
    failed = wait(processes)
    for reader in readers:
        reader.join()
    if failed is None:
        return 0
    code = processes[failed].returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    command = shlex.join(["python", *sys.argv])
    print(f"launch: process {failed} {how}; the same command goes on: {command}", file=sys.stderr)
    return 128 - code if code < 0 else code


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line; what follows `--` is for the training command."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--cpu_devices", type=int, help="simulated CPU devices of each process")
    parser.add_argument("--log_dir", type=Path, help="folder of a file for each process's lines")
    options = parser.parse_args(arguments[:cut])
    options.training = arguments[cut + 1 :]
    return options


def start(options: argparse.Namespace, number: int, address: str) -> subprocess.Popen[str]:
    """Starts a process in a group of its own, so that a Ctrl-C reaches it through us alone."""
    env = dict(os.environ)
    env["JAX_COORDINATOR_ADDRESS"] = address
    env["JAX_NUM_PROCESSES"] = str(options.processes)
    env["JAX_PROCESS_ID"] = str(number)
    if options.cpu_devices:
        flag = f"--xla_force_host_platform_device_count={options.cpu_devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}"
    output = subprocess.PIPE
    if options.log_dir:
        options.log_dir.mkdir(parents=True, exist_ok=True)
        output = open(options.log_dir / f"process-{number}.log", "w")
    command = [sys.executable, "-m", "jaxtune.train", *options.training]
    return subprocess.Popen(
        command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def follow(process: subprocess.Popen[str], number: int) -> threading.Thread:
    """Passes a process's lines on, each with its number."""

    def pass_on() -> None:
        for line in process.stdout or ():
            sys.stdout.write(f"[{number}] {line}")
            sys.stdout.flush()

    thread = threading.Thread(target=pass_on)
    thread.start()
    return thread


def wait(processes: list[subprocess.Popen[str]]) -> int | None:
    """Waits for all; the number of the first that failed. After a failure the others must end."""
    failed, signals = None, [signal.SIGTERM, signal.SIGKILL]
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if failed is None:
            failed = next((n for n, process in enumerate(processes) if process.poll()), None)
            if failed is not None:
                deadline = time.monotonic() + NOTICE_SECONDS
        elif time.monotonic() > deadline and signals:
            tell(processes, signals.pop(0))
            deadline = time.monotonic() + END_SECONDS
    if failed is None:
        failed = next((n for n, process in enumerate(processes) if process.poll()), None)
    return failed


def tell(processes: list[subprocess.Popen[str]], number: int) -> None:
    """Sends a signal to those that run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
