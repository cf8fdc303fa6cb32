"""Reading a launcher's variables: torchrun's, those of the MPIs, SLURM's."""

from __future__ import annotations

import pytest

from accelerate.runtime.cluster import cluster_env
from accelerate.runtime.cluster.cluster_env import from_environment, from_scheduler
from accelerate.settings import env
from tests.helpers.slurm import job, task

LAUNCHERS = [name for _, names in cluster_env._LAUNCHERS for name in names]
OMPI = {
    "OMPI_COMM_WORLD_RANK": 2,
    "OMPI_COMM_WORLD_SIZE": 4,
    "OMPI_COMM_WORLD_LOCAL_RANK": 0,
    "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
}
URI = "1269104640.0;tcp://192.0.2.2,10.0.0.2:34857;tcp6://[fd00::2]:57109"


@pytest.fixture(autouse=True)
def alone():
    env.publish(dict.fromkeys([*LAUNCHERS, "MASTER_ADDR", "MASTER_PORT", "OMPI_MCA_orte_hnp_uri", *task(0, [1])]))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, (1, 4, 1, 2)),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}, (5, 8, 1, 4)),
        ({"RANK": 0, "WORLD_SIZE": 1}, (0, 1, 0, 1)),
        ({"RANK": 3, "WORLD_SIZE": 4}, (3, 4, 3, 4)),
        ({"WORLD_SIZE": 1}, None),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": URI}, (2, 4, 0, 2)),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, None),
        ({"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2}, (1, 2, 1, 2)),
        ({"MV2_COMM_WORLD_RANK": 1, "MV2_COMM_WORLD_SIZE": 2}, (1, 2, 1, 2)),
        # torchrun started by mpirun: the innermost launcher decides
        ({"RANK": 0, "WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_SIZE": 6}, (0, 2, 0, 2)),
        (task(5, [2, 2, 2, 1], "node[03-05,9]"), (5, 7, 1, 2)),
        # srun --mpi=pmi2 sets PMI's variables as well, without those for the node
        ({**task(3, [2, 2]), "PMI_RANK": 3, "PMI_SIZE": 4}, (3, 4, 1, 2)),
        # mpirun inside of a step of SLURM's that runs one starter on each node
        ({**task(1, [1, 1]), **OMPI}, (2, 4, 0, 2)),
        ({**task(1, [1, 1]), "PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2}, (3, 4, 1, 2)),
        # a batch script that runs python itself, and an interactive shell
        (job(nodes=2), None),
        (task(0, [1]), None),
    ],
)
def test_the_place_comes_from_the_variables(variables, expected):
    env.publish(variables)
    place = from_environment()
    found = None if place is None else (place.rank, place.size, place.local_rank, place.local_size)
    assert found == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": 0}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 2}, "LOCAL_RANK=3"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3}, "LOCAL_WORLD_SIZE=3"),
        ({"RANK": "first", "WORLD_SIZE": 2}, "RANK: expected an integer, found 'first'"),
    ],
)
def test_variables_that_contradict_each_other_are_named(variables, said):
    env.publish(variables)
    with pytest.raises(ValueError, match=said):
        from_environment()


def test_torchruns_variables_are_not_the_schedulers():
    env.publish({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 7})
    assert from_scheduler() is None
    env.publish(OMPI)
    place = from_scheduler()
    assert place is not None and (place.source, place.rank) == ("Open MPI", 2)


@pytest.mark.parametrize(
    ("variables", "address", "guessed"),
    [
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": 4}, "127.0.0.1", False),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": URI}, "192.0.2.2", True),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": URI, "MASTER_ADDR": "h"}, "h", False),
        ({"PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2, **job()}, "node01", True),
        (task(1, [1, 1], "gpu[07-08]"), "gpu07", True),
        (task(1, [2], "gpu07"), "127.0.0.1", False),
        ({**task(1, [1, 1]), "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", False),
    ],
)
def test_where_the_main_process_is(variables, address, guessed):
    env.publish(variables)
    place = from_environment()
    assert place is not None and (place.address, bool(place.address_source)) == (address, guessed)


def test_several_machines_without_an_address_are_told_what_to_set():
    env.publish({"PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2})
    with pytest.raises(ValueError, match=r"several machines.*set MASTER_ADDR.*--main_process_ip"):
        from_environment()
    place = from_environment(address_needed=False)
    assert place is not None and place.rank == 3
    assert from_scheduler() == place


def test_the_port_is_the_steps_own():
    env.publish(task(1, [1, 1]))
    place = from_environment()
    assert place is not None and place.port == 10000 + 31 * 4711 % 20000
    env.publish({"MASTER_PORT": 29600})
    place = from_environment()
    assert place is not None and place.port == 29600
