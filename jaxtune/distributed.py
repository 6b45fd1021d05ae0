"""Several processes as one: start-up, host data on global arrays and back, agreement.

With one process everything here is what it would be without it.
"""

import atexit
import itertools
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxtune import cluster, process
from jaxtune.aborts import on_abort
from jaxtune.errors import ConfigError, listing
from jaxtune.schema import Distributed

LONG_MS = 7 * 24 * 3600 * 1000  # a wait that ends by the loss of a process, not by time
_calls = itertools.count()  # names what is agreed; all processes count alike


def start(options: Distributed) -> None:
    """Joins the other processes of the run, if there are any; must precede any use of devices.

    A program that has called `jax.distributed.initialize` itself is left as it is.

    Raises:
        ConfigError: the place among the processes is described in part, or the others do not come.
    """
    if not jax.distributed.is_initialized():
        arguments = cluster.find(options)
        if arguments is None:
            return
        # Its handler would keep SIGTERM from us; the stop is agreed on by `Vote`.
        jax.config.update("jax_enable_preemption_service", False)
        on_abort(_not_found)
        try:
            jax.distributed.initialize(
                **arguments, initialization_timeout=options.start_timeout_seconds
            )
        except (RuntimeError, ValueError) as error:
            raise _not_found() from error
        atexit.register(jax.distributed.shutdown)
    process.set_place(global_state.process_id, global_state.num_processes)
    if not process.is_first():
        logging.getLogger("jaxtune").setLevel(logging.ERROR)


def _not_found() -> ConfigError:
    return ConfigError(
        "the processes of the run do not find each other "
        f"(this is process {global_state.process_id}, the coordinator should be at "
        f"{global_state.coordinator_address}) - start all of them within "
        "distributed.start_timeout_seconds, each with its own number, and let them reach that port"
    )


# Host data and global arrays.


def to_device(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A host array that every process holds whole, as a global array of any sharding.

    None stands for this process's default device.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def held_rows(sharding: NamedSharding, rows: int) -> tuple[int, ...]:
    """The rows of a batch of so many that this process's devices hold, ascending.

    Processes hold the same rows where a mesh axis that does not cut rows runs across them.

    Args:
        sharding: of an array [rows].
        rows: in the batch of all processes.
    """
    held: set[int] = set()
    for index in sharding.addressable_devices_indices_map((rows,)).values():
        held.update(range(rows)[index[0]] if index else ())
    return tuple(sorted(held))


def batch_to_device(
    array: np.ndarray, sharding: NamedSharding, rows: int, held: tuple[int, ...]
) -> jax.Array:
    """The rows [..., held, T] of a batch, as the global array [..., rows, T]."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    place = {row: position for position, row in enumerate(held)}

    def part(index: Any) -> np.ndarray:
        own = [place[row] for row in range(rows)[index[-2]]]
        return array[..., own, :][..., index[-1]]

    shape = (*array.shape[:-2], rows, array.shape[-1])
    return jax.make_array_from_callback(shape, sharding, part)


def to_host(array: Any) -> np.ndarray:
    """The whole of an array on the host of every process; all must call it, in the same order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


# Agreement.


class Vote:
    """Whether any process says yes, asked again and again.

    With several processes an answer belongs to the question before: the devices bring the answers
    together while the next step runs, and all processes read the same one at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked = self._put(False)

    def ask(self, yes: bool) -> bool:
        """The answer to the question before; with one process to this one."""
        if jax.process_count() == 1:
            return yes
        answer, self._asked = self._asked, self._put(yes)
        return bool(answer)

    def decide(self, yes: bool) -> bool:
        """The answer to this question; waits for all processes."""
        return bool(self._put(yes))

    def _put(self, yes: bool) -> Any:
        if jax.process_count() == 1:
            return yes
        flag = np.array([yes])
        size = (self._each.mesh.size,)
        return self._any(jax.make_array_from_callback(size, self._each, lambda _: flag))


def smallest(value: float | None) -> float | None:
    """The smallest value that a process gives, rounded to float32; None if all give None."""
    if jax.process_count() == 1:
        return value
    mine = np.float32(math.inf if value is None else value)
    found = float(multihost_utils.process_allgather(mine).min())
    return None if math.isinf(found) else found


def wait_for_all(purpose: str) -> None:
    """Waits until every process is here."""
    if process.count() > 1:
        client().wait_at_barrier(f"jaxtune/{purpose}/{next(_calls)}", LONG_MS)


def check_same(facts: Mapping[str, str]) -> None:
    """Compares what the processes are about to do with what process 0 is.

    Raises:
        ConfigError: on every process; it names those that differ, and in what.
    """
    if process.count() == 1:
        return
    folder = f"jaxtune/same/{next(_calls)}"
    if process.is_first():
        client().key_value_set(f"{folder}/facts", json.dumps(dict(facts)))
    first = json.loads(client().blocking_key_value_get(f"{folder}/facts", LONG_MS))
    differing = [
        f"process {process.index()} has {name}={facts.get(name)}, process 0 {first.get(name)}"
        for name in sorted(first.keys() | facts.keys())
        if first.get(name) != facts.get(name)
    ]
    if differing:
        client().key_value_set(f"{folder}/differing/{process.index()}", listing(differing, 5))
    wait_for_all("compared")
    found = client().key_value_dir_get(f"{folder}/differing")
    _forget(folder)
    if found:
        raise ConfigError(
            f"{len(found)} of {process.count()} processes differ from process 0 - start all with "
            f"the same options, code and data:{''.join(text for _, text in found)}"
        )


def exchange(text: str) -> list[str]:
    """What each process gives, in the order of their numbers; waits for all."""
    if process.count() == 1:
        return [text]
    folder = f"jaxtune/exchanged/{next(_calls)}"
    client().key_value_set(f"{folder}/{process.index()}", text)
    wait_for_all("exchanged")
    given = [client().key_value_try_get(f"{folder}/{n}") for n in range(process.count())]
    _forget(folder)
    return given


def _forget(folder: str) -> None:
    """Deletes what was exchanged once all have read it: process 0 would keep it to the end."""
    wait_for_all("read")
    if process.is_first():
        client().key_value_delete(folder)


def leave() -> None:
    """Parts from the other processes, which must do so now, too."""
    jax.distributed.shutdown()


def client() -> Any:
    """JAX's connection to the coordination service in process 0."""
    return global_state.client
