"""How a process finds the others of its run.

Asked in turn: the options of the config, the variables of a launcher, the clusters that JAX itself
recognises (Open MPI 4, SLURM, TPU pods). If none of them says otherwise there is one process.
"""

import os
from typing import Any

from jax._src import clusters

from jaxtune.errors import ConfigError
from jaxtune.schema import Distributed

# What a process must know, and the variables that may say it, the first that is set deciding:
# ours, Kubernetes' for indexed jobs, Open MPI's (since 5.0 it no longer names a host itself).
VARIABLES = {
    "coordinator_address": ("JAX_COORDINATOR_ADDRESS",),
    "num_processes": ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
    "process_id": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK"),
}

# JAX's cluster for Kubernetes asks the API server, for which pods need rights; variables do not.
_KNOWN_TO_JAX: tuple[Any, ...] = (
    clusters.OmpiCluster,
    clusters.SlurmCluster,
    clusters.GkeTpuCluster,
    clusters.GceTpuCluster,
)


def find(options: Distributed) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None if there is one process.

    Raises:
        ConfigError: options or variables that are set in part, or contradict each other.
    """
    given = {name: getattr(options, name) for name in VARIABLES}
    if options.local_device_ids or any(value is not None for value in given.values()):
        absent = [name for name, value in given.items() if value is None]
        if absent:
            raise ConfigError(
                f"config.distributed: {' and '.join(absent)} missing - give all of "
                f"{', '.join(VARIABLES)}, or none and let the launcher's variables say it"
            )
        return _arguments(given, list(options.local_device_ids) or None)
    if _is_named():
        return _arguments(_from_variables(), None)
    found = next((known for known in _KNOWN_TO_JAX if known.is_env_present()), None)
    if found is None or found.get_process_count() == 1:
        return None
    return {"cluster_detection_method": found.name}


def _is_named() -> bool:
    """Whether variables describe the run. Indexed jobs alone do not: they may be many runs."""
    if "JAX_NUM_PROCESSES" in os.environ or "JAX_PROCESS_ID" in os.environ:
        return True
    return "OMPI_COMM_WORLD_SIZE" in os.environ and not clusters.OmpiCluster.is_env_present()


def _from_variables() -> dict[str, Any]:
    values: dict[str, Any] = {}
    absent = []
    for name, variables in VARIABLES.items():
        variable = next((v for v in variables if v in os.environ), None)
        if variable is None:
            absent.append(" or ".join(variables))
        elif name == "coordinator_address":
            values[name] = os.environ[variable]
        else:
            values[name] = _number(variable)
    if values.get("num_processes") == 1:
        return {"num_processes": 1, "process_id": 0}
    if absent:
        known = [v for variables in VARIABLES.values() for v in variables if v in os.environ]
        raise ConfigError(
            f"{', '.join(known)} is set but not {' nor '.join(absent)} - a process of several "
            "needs the coordinator's address, the number of processes and its own number"
        )
    return values


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"{variable}={os.environ[variable]!r} is not a number") from None


def _arguments(values: dict[str, Any], local_device_ids: list[int] | None) -> dict[str, Any] | None:
    if not 0 <= values["process_id"] < values["num_processes"]:
        raise ConfigError(
            f"process {values['process_id']} of {values['num_processes']}: processes are numbered "
            "from 0 - start each with its own number"
        )
    if values["num_processes"] == 1:
        return None
    host, _, port = values["coordinator_address"].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"coordinator address {values['coordinator_address']!r} - give host:port of process 0"
        )
    detection = {"cluster_detection_method": "deactivate", "local_device_ids": local_device_ids}
    return values | detection
