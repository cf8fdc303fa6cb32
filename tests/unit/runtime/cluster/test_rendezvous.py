"""Meeting peers that are not there."""

from __future__ import annotations

import datetime
import socket

import pytest

from accelerate.runtime.cluster import rendezvous
from accelerate.runtime.cluster.cluster_env import RankInfo
from accelerate.settings import env


@pytest.fixture(autouse=True)
def alone():
    env.publish(dict.fromkeys(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]))


def test_a_main_process_that_does_not_answer_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = RankInfo(1, 2, 1, 2, "torchrun", "127.0.0.1", port)
    with pytest.raises(RuntimeError, match=rf"rank 1 of 2 could not connect to the store at 127.0.0.1:{port}"):
        rendezvous.init_store(place, None, datetime.timedelta(seconds=1))


def test_a_rank_that_never_joins_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = RankInfo(0, 3, 0, 3, "torchrun", "127.0.0.1", port)
    with pytest.raises(RuntimeError, match="waited 1 s for ranks 1, 2 to join"):
        rendezvous.init_store(place, None, datetime.timedelta(seconds=1))


def test_a_taken_port_says_so():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        place = RankInfo(0, 2, 0, 2, "torchrun", "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=r"port is taken.*--main_process_port"):
            rendezvous.init_store(place, None, datetime.timedelta(seconds=2))


def test_rank_0_that_is_not_where_its_peers_look_for_it_says_so():
    place = RankInfo(0, 4, 0, 2, "Open MPI", "192.0.2.77", 29500, "OMPI_MCA_orte_hnp_uri")
    with pytest.raises(
        RuntimeError, match=r"connect to 192.0.2.77, guessed from OMPI_MCA_orte_hnp_uri: set MASTER_ADDR"
    ):
        rendezvous.init_store(place, None, datetime.timedelta(seconds=1))
