"""Reading a launcher's variables, and meeting peers that are not there."""

from __future__ import annotations

import datetime
import socket

import pytest

from accelerate.runtime import rendezvous
from accelerate.settings import env

LAUNCHERS = [name for _, names in rendezvous._LAUNCHERS for name in names]


@pytest.fixture(autouse=True)
def alone():
    env.publish(dict.fromkeys([*LAUNCHERS, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST"]))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, (1, 4, 1, 2)),
        ({"RANK": 0, "WORLD_SIZE": 1}, (0, 1, 0, 1)),
        ({"RANK": 3, "WORLD_SIZE": 4}, (3, 4, 3, 4)),
        ({"WORLD_SIZE": 1}, None),
        (
            {
                "OMPI_COMM_WORLD_RANK": 2,
                "OMPI_COMM_WORLD_SIZE": 4,
                "OMPI_COMM_WORLD_LOCAL_RANK": 0,
                "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
            },
            (2, 4, 0, 2),
        ),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, None),
        ({"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2}, (1, 2, 1, 2)),
        ({"MV2_COMM_WORLD_RANK": 1, "MV2_COMM_WORLD_SIZE": 2}, (1, 2, 1, 2)),
        # torchrun started by mpirun: the innermost launcher decides
        ({"RANK": 0, "WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 5, "OMPI_COMM_WORLD_SIZE": 6}, (0, 2, 0, 2)),
        (
            {
                "SLURM_PROCID": 5,
                "SLURM_STEP_NUM_TASKS": 7,
                "SLURM_LOCALID": 1,
                "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
                "SLURM_STEP_NODELIST": "node[03-05,9]",
            },
            (5, 7, 1, 2),
        ),
        # a batch script that runs python itself, and an interactive shell
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 8}, None),
        ({"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1}, None),
    ],
)
def test_the_place_comes_from_the_variables(variables, expected):
    env.publish(variables)
    place = rendezvous.from_environment()
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
        rendezvous.from_environment()


def test_slurm_gives_the_first_host_and_a_port_of_the_job():
    env.publish(
        {
            "SLURM_PROCID": 1,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_STEP_NODELIST": "gpu[07-08]",
            "SLURM_JOB_ID": 123456,
        }
    )
    place = rendezvous.from_environment()
    assert (place.address, place.port) == ("gpu07", 10000 + 123456 % 50000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[03,7],m1", "n03"), ("n[1-2]-ib", "n1-ib")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert rendezvous.first_host(nodes) == first


def test_a_main_process_that_does_not_answer_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = rendezvous.Placement(1, 2, 1, 2, "torchrun", "127.0.0.1", port)
    with pytest.raises(RuntimeError, match=rf"rank 1 of 2 could not meet its peers at 127.0.0.1:{port}"):
        rendezvous.meet(place, None, datetime.timedelta(seconds=1))


def test_a_rank_that_never_joins_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = rendezvous.Placement(0, 3, 0, 3, "torchrun", "127.0.0.1", port)
    with pytest.raises(RuntimeError, match="waited 1 s for ranks 1, 2 to join"):
        rendezvous.meet(place, None, datetime.timedelta(seconds=1))


def test_a_taken_port_says_so():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        place = rendezvous.Placement(0, 2, 0, 2, "torchrun", "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=r"port is taken.*--main_process_port"):
            rendezvous.meet(place, None, datetime.timedelta(seconds=2))
