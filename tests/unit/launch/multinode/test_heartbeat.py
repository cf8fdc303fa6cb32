"""What launchers of several machines tell each other; here all of them share this process and one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import DistNetworkError, HashStore, Store

from accelerate.launch.multinode.heartbeat import NodeExit, PeerExitError, PeerMonitor

Make = Callable[..., PeerMonitor]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes machines `rank` of `count` at one store."""
    shared, made = HashStore(), []

    def one(rank: int, count: int = 2, silence: float = 60.0, store: Store = shared) -> PeerMonitor:
        made.append(PeerMonitor(lambda: store, rank, count, f"machine {rank}", "machine 0", silence))
        return made[-1]

    yield one
    for machine in made:
        machine.stop()


def wait_for_trouble(machine: PeerMonitor) -> NodeExit:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            machine.check()
        except PeerExitError as trouble:
            return trouble.end
        time.sleep(0.02)
    raise AssertionError("nothing was noticed")


def test_all_ended_well(make: Make) -> None:
    first, second = make(0), make(1)
    second.publish_exit(NodeExit("machine 1"))
    first.exit_barrier()
    second.exit_barrier()
    second.leave(last=False)
    first.leave(last=True)
    assert not first.is_alive() and not second.is_alive()


def test_a_failure_is_told(make: Make) -> None:
    first, second = make(0), make(1)
    second.publish_exit(NodeExit("machine 1", "machine 1: rank 1 exited with code 3", 3))
    assert wait_for_trouble(first) == NodeExit("machine 1", "machine 1: rank 1 exited with code 3", 3)
    with pytest.raises(PeerExitError, match="rank 1 exited with code 3"):
        first.exit_barrier()


def test_the_last_to_end_may_end_badly(make: Make) -> None:
    first, second = make(0), make(1)
    timer = threading.Timer(0.3, second.publish_exit, [NodeExit("machine 1", "machine 1: exited with code 3", 3)])
    timer.start()
    with pytest.raises(PeerExitError, match="exited with code 3"):
        first.exit_barrier()


def test_the_one_to_blame_is_found_behind_those_that_lost_a_peer(make: Make) -> None:
    first, second, third = make(0, 3), make(1, 3), make(2, 3)
    second.publish_exit(NodeExit("machine 1", "lost its peer", 1, is_symptom=True))
    assert wait_for_trouble(first).is_symptom
    third.publish_exit(NodeExit("machine 2", "machine 2: out of memory", 137))
    found = first.find_root_cause()
    assert found is not None and found.code == 137
    third.publish_exit(NodeExit("machine 2"))  # nobody else to blame for machine 2: its own words stay
    assert third.find_root_cause() is None


def test_silence(make: Make) -> None:
    first, second = make(0, silence=1.5), make(1)
    time.sleep(0.2)
    first.check()
    second.stop()
    end = wait_for_trouble(first)
    assert end.code == 1 and end.line.startswith("machine 1 is gone: no heartbeat for 1.5 s")


def test_a_store_that_is_gone(make: Make) -> None:
    class Gone(HashStore):
        def add(self, key: str, amount: int) -> int:
            raise DistNetworkError("Broken pipe")

    end = wait_for_trouble(make(1, store=Gone()))
    assert end.line.startswith("machine 0 is gone: the connection to it is lost")


def test_a_call_to_start_again(make: Make) -> None:
    first, second = make(0), make(1)
    second.request_restart()
    deadline = time.monotonic() + 20
    while not first.restart_requested and time.monotonic() < deadline:
        time.sleep(0.02)
    assert first.restart_requested
