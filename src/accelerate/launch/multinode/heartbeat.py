"""Heartbeats between the launchers of several machines, and how the ranks of each have ended.

A thread with a connection of its own makes all requests to the store, because requests to a machine that has lost its power
block. The machine with group rank 0 monitors all others; they monitor it, and read the failures that are published.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 1.0
_FAST_BEAT_SECONDS = 0.1
# Heartbeat timeout once ranks here have lost a peer, and how long to search for the root cause.
_SUSPECT_SECONDS = 5.0
_ROOT_CAUSE_SECONDS = 12.0
_LEAVE_SECONDS = 15.0


class NodeExit(NamedTuple):
    """How the ranks on one machine have ended.

    Attributes:
        node_name: The machine, for messages.
        line: The line that the other launchers print.
        code: The exit code; 0 if all ranks succeeded.
        is_symptom: Whether the root cause is on another machine.
    """

    node_name: str
    line: str = ""
    code: int = 0
    is_symptom: bool = False


class PeerExitError(Exception):
    """The ranks here must end because those of another machine have failed.

    Attributes:
        end: The exit of that machine.
    """

    def __init__(self, end: NodeExit) -> None:
        super().__init__(end.line)
        self.end = end


class PeerMonitor(threading.Thread):
    """Monitors the other machines during one round.

    Args:
        connect: Opens a connection to the store, with keys of this round.
        rank: Group rank of this machine.
        count: Number of machines in the round.
        node_name: This machine, for messages.
        store_host: The machine that hosts the store, for messages.
        timeout: Seconds without a heartbeat after which a machine counts as gone.

    Attributes:
        restart_requested: Whether a machine has requested that all restart their ranks.
    """

    def __init__(
        self, connect: Callable[[], Store], rank: int, count: int, node_name: str, store_host: str, timeout: float
    ) -> None:
        super().__init__(name="accelerate-peers", daemon=True)
        self.restart_requested = False
        self.node_name = node_name
        self._store_host = store_host
        self._connect, self._rank, self._count, self._timeout = connect, rank, count, timeout
        self._outbox: deque[Callable[[Store], Any]] = deque()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._interval = _BEAT_SECONDS
        self._beats = 0
        self._last_exchange = time.monotonic()
        self._connection_lost = False
        self._ended = self._left = 0  # numbers of machines
        self._failed: dict[int, NodeExit] = {}
        self._heartbeats: dict[int, tuple[str, float]] = {}  # rank -> the last heartbeat, and when it arrived
        self._node_names: dict[int, str] = {}
        self.start()

    # Called by the launcher; none of it blocks on the network ----------------------------------------------------------

    def check(self) -> None:
        """Checks that all peers are alive and none has failed.

        Raises:
            PeerExitError: if one has failed, or its heartbeat timed out.
        """
        end = self._peer_failure(self._timeout)
        if end is not None:
            raise PeerExitError(end)

    def find_root_cause(self) -> NodeExit | None:
        """Waits some seconds for the failure of another machine that explains why ranks here lost a peer."""
        self._wake_up()
        deadline = time.monotonic() + _ROOT_CAUSE_SECONDS
        while time.monotonic() < deadline and self._ended < self._count - 1:
            end = self._peer_failure(min(self._timeout, _SUSPECT_SECONDS))
            if end is not None and not end.is_symptom:
                return end
            time.sleep(_FAST_BEAT_SECONDS)
        end = self._peer_failure(self._timeout)
        return None if end is None or end.is_symptom else end

    def request_restart(self) -> None:
        """Requests that all machines restart their ranks."""
        self._send(lambda store: store.set("restart", "1"))

    def exit_barrier(self) -> None:
        """Publishes that the ranks here have succeeded, and waits until all have.

        Raises:
            PeerExitError: if those of another machine have failed.
        """
        self.publish_exit(NodeExit(self.node_name))
        while self._ended < self._count:
            self.check()
            time.sleep(_FAST_BEAT_SECONDS)
        self.check()

    def publish_exit(self, end: NodeExit) -> None:
        """Publishes how the ranks here have ended."""

        def send(store: Store) -> None:
            store.set(f"end/{self._rank}", json.dumps(end))
            if end.code:
                store.add("failed", 1)
            store.add("ended", 1)

        self._send(send)

    def leave(self, last: bool) -> None:
        """Sends what is pending, and stops.

        Args:
            last: Whether this machine hosts the store, and so waits until the machines that are alive have left.
        """
        self._send(lambda store: store.add("left", 1))
        deadline = time.monotonic() + (_LEAVE_SECONDS if last else 2.0)
        while self.is_alive() and time.monotonic() < deadline:
            if not self._outbox and (not last or self._left + len(self._silent_peers(_SUSPECT_SECONDS)) >= self._count):
                break
            time.sleep(_FAST_BEAT_SECONDS)
        self.stop()

    def stop(self) -> None:
        """Stops without sending what is pending."""
        self._stopped.set()
        self._wake.set()
        self.join(timeout=2.0)

    def _send(self, request: Callable[[Store], Any]) -> None:
        self._outbox.append(request)
        self._wake_up()

    def _wake_up(self) -> None:
        self._interval = _FAST_BEAT_SECONDS
        self._wake.set()

    def _peer_failure(self, timeout: float) -> NodeExit | None:
        failed = [end for rank, end in sorted(self._failed.items()) if rank != self._rank]
        if failed:
            return min(failed, key=lambda end: end.is_symptom)
        silent = self._silent_peers(timeout)
        if silent:
            return _lost_node(self._node_names[min(silent)], f"no heartbeat for {timeout:g} s")
        if self._connection_lost or time.monotonic() - self._last_exchange > timeout:
            return _lost_node(self._store_host, "the connection to it is lost")
        return None

    def _silent_peers(self, timeout: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in self._heartbeats.copy().items() if now - since > timeout]

    # The thread --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        from torch.distributed import DistError

        try:
            store = self._connect()
            while not self._stopped.is_set():
                self._exchange(store)
                self._last_exchange = time.monotonic()
                self._wake.wait(self._interval)
                self._wake.clear()
        except DistError:  # the machine that hosts the store is gone
            self._connection_lost = True

    def _exchange(self, store: Store) -> None:
        self._beats += 1
        store.set(f"heartbeat/{self._rank}", f"{self._beats} {self.node_name}")
        while self._outbox:
            self._outbox[0](store)
            self._outbox.popleft()
        self.restart_requested = self.restart_requested or store.check(["restart"])
        ended, self._left = store.add("ended", 0), store.add("left", 0)
        if store.check(["failed"]):
            for rank in range(self._count):
                if rank not in self._failed and store.check([f"end/{rank}"]):
                    end = NodeExit(*json.loads(store.get(f"end/{rank}")))
                    self._failed = {
                        **self._failed,
                        **({rank: end} if end.code else {}),
                    }  # the launcher reads it meanwhile
        self._ended = ended  # last, as the launcher relies on the failures once it is set
        for rank in range(1, self._count if self._rank == 0 else 1):
            self._read_heartbeat(store, rank)

    def _read_heartbeat(self, store: Store, rank: int) -> None:
        if not store.check([f"heartbeat/{rank}"]):
            return
        beat = store.get(f"heartbeat/{rank}").decode()
        self._node_names[rank] = beat.partition(" ")[2]
        if self._heartbeats.get(rank, ("", 0.0))[0] != beat:
            self._heartbeats[rank] = (beat, time.monotonic())
        elif self._ended and store.check([f"end/{rank}"]):  # it has ended, so its heartbeats have
            self._heartbeats.pop(rank)


def _lost_node(node_name: str, reason: str) -> NodeExit:
    line = f"{node_name} is gone: {reason}. Its launcher was killed, it stopped, or the network failed"
    return NodeExit(node_name, line, 1)
