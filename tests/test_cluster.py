"""Where a process finds the others: options, variables, clusters; and what half of them gets."""

import os

import pytest

from jaxtune import cluster
from jaxtune.errors import ConfigError
from jaxtune.schema import Distributed

PLACE = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 2}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "SLURM_", "OMPI_", "JOB_")):
            monkeypatch.delenv(name)


def found(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **options):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return cluster.find(Distributed(**options))


def assert_place(arguments) -> None:
    assert arguments is not None
    assert {name: arguments[name] for name in PLACE} == PLACE
    assert arguments["cluster_detection_method"] == "deactivate"


def test_one_process_when_nothing_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert found(monkeypatch, {}) is None
    assert found(monkeypatch, {"JOB_COMPLETION_INDEX": "3"}) is None
    assert found(monkeypatch, {"JAX_NUM_PROCESSES": "1"}) is None


def test_options_come_before_variables(monkeypatch: pytest.MonkeyPatch):
    others = VARIABLES | {"JAX_PROCESS_ID": "0"} | SLURM
    arguments = found(monkeypatch, others, **PLACE, local_device_ids=(1, 3))
    assert_place(arguments)
    assert arguments["local_device_ids"] == [1, 3]


def test_variables_come_before_the_cluster(monkeypatch: pytest.MonkeyPatch):
    assert_place(found(monkeypatch, VARIABLES | SLURM | {"SLURM_NTASKS": "8"}))


def test_indexed_job(monkeypatch: pytest.MonkeyPatch):
    job = {name: value for name, value in VARIABLES.items() if name != "JAX_PROCESS_ID"}
    assert_place(found(monkeypatch, job | {"JOB_COMPLETION_INDEX": "2"}))


def test_open_mpi_of_both_kinds(monkeypatch: pytest.MonkeyPatch):
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    address = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
    assert_place(found(monkeypatch, ranks | address))
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_RANK is set but not JAX_COORDINATOR"):
        found(monkeypatch, ranks)
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert found(monkeypatch, ranks | uri) == {"cluster_detection_method": "ompi"}


def test_slurm(monkeypatch: pytest.MonkeyPatch):
    assert found(monkeypatch, SLURM) == {"cluster_detection_method": "slurm"}
    assert found(monkeypatch, SLURM | {"SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize("absent", PLACE)
def test_options_given_in_part(monkeypatch: pytest.MonkeyPatch, absent: str):
    given = {name: value for name, value in PLACE.items() if name != absent}
    with pytest.raises(ConfigError, match=f"config.distributed: {absent} missing"):
        found(monkeypatch, {}, **given)


@pytest.mark.parametrize("absent", VARIABLES)
def test_variables_given_in_part(monkeypatch: pytest.MonkeyPatch, absent: str):
    given = {name: value for name, value in VARIABLES.items() if name != absent}
    with pytest.raises(ConfigError, match=f"is set but not .*{absent}"):
        found(monkeypatch, given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": "4"}, "process 4 of 4: processes are numbered from 0"),
        ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID='two' is not a number"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "'10.0.0.1' - give host:port"),
    ],
)
def test_wrong_values(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        found(monkeypatch, VARIABLES | changed)
