"""Ends what the launcher would leave behind: a small process that outlives it by a moment; and notes who died when.

`Guard` is forked before torch is imported and holds one end of a pipe. However the launcher ends, the pipe closes, and
the process groups it was told of are killed: the ranks and what they started. `Deaths` is how the launcher knows which
rank failed first: the others often fail a moment later, because the first is gone.
"""

from __future__ import annotations

import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable

# How long to wait, when a rank has failed because of a peer, for that peer to end as well.
SETTLE_SECONDS = 2.0
_LOST_A_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
# gloo, NCCL's watchdog, torch's stores and its monitored barrier, and `runtime.rendezvous.init_store`.
_TIMED_OUT = re.compile(
    r"Timed out waiting \d+ms for|collective operation timeout|wait timeout after \d+ms|seconds waiting for clients"
    r"|failed to pass monitoredBarrier|to join and gave up"
)


def lost_a_peer(error: str) -> bool:
    """Returns whether a rank's error states that another rank is gone: such a rank is not the cause."""
    return any(words in error for words in _LOST_A_PEER)


def timed_out(error: str) -> bool:
    """Returns whether a rank's error states that another rank did not take part in time: it is not the cause either."""
    return _TIMED_OUT.search(error) is not None


def state_of(pid: int) -> str:
    """Returns the letter for the state of a process in /proc (R, S, D, T, t, Z, …), or "" where it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return chr(file.read().rpartition(b")")[2].split()[0][0])
    except (OSError, IndexError):  # it has ended, or this is not Linux
        return ""


class Guard:
    """Watches over process groups until `release`; does nothing on a system without fork."""

    def __init__(self) -> None:
        self._writing = -1
        if not hasattr(os, "fork"):
            return
        reading, self._writing = map(_out_of_the_way, os.pipe())
        self._pid = os.fork()
        if self._pid == 0:
            _guard(reading)
        os.close(reading)

    def watch(self, groups: Iterable[int]) -> None:
        """Kills these process groups when the launcher ends."""
        self._tell("+", groups)

    def forget(self, groups: Iterable[int]) -> None:
        """Lets these process groups live."""
        self._tell("-", groups)

    def release(self) -> None:
        """Ends the guard; groups it still watches are killed."""
        if self._writing >= 0:
            os.close(self._writing)
            os.waitpid(self._pid, 0)

    def _tell(self, what: str, groups: Iterable[int]) -> None:
        if self._writing >= 0:
            os.write(self._writing, "".join(f"{what}{group}\n" for group in groups).encode())


def _out_of_the_way(descriptor: int) -> int:
    """Moves a descriptor off the numbers of the standard streams, which may be free because they were closed."""
    if descriptor > 2:
        return descriptor
    import fcntl

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


def _guard(pipe: int) -> None:
    """The guard's whole life; never returns."""
    os.setsid()  # Ctrl-C and signals to the launcher's group are not for the guard
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # nobody shall wait for the end of a stream because the guard holds it
        os.dup2(nowhere, stream)
    os.dup2(pipe, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    groups: set[int] = set()
    with os.fdopen(3) as told:
        for line in told:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    kill(groups)
    os._exit(0)


def kill(groups: Iterable[int]) -> None:
    """Kills process groups; one that is gone already is fine."""
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone; or its number belongs to somebody else by now
            continue


class Deaths(threading.Thread):
    """Notes when each process of a set ends, without reaping it.

    Args:
        processes: Process ids.
        ended: Called with the process id and its exit status (negative: a signal) in this thread.

    Attributes:
        times: Process id -> nanoseconds since the epoch.
        able: False where the system has no process descriptors: `times` stays empty.
    """

    def __init__(self, processes: Iterable[int], ended: Callable[[int, int], None]) -> None:
        super().__init__(name="accelerate-deaths", daemon=True)
        self.times: dict[int, int] = {}
        self._ended = ended
        self._open: dict[int, int] = {}
        for pid in processes:
            try:
                self._open[os.pidfd_open(pid)] = pid
            except (AttributeError, OSError):  # not Linux, or an old one
                continue
        self.able = bool(self._open)
        self.start()

    def run(self) -> None:
        waiting = select.poll()
        for descriptor in self._open:
            waiting.register(descriptor, select.POLLIN)
        while self._open:
            for descriptor, _ in waiting.poll():
                now = time.time_ns()
                pid = self._open.pop(descriptor)
                waiting.unregister(descriptor)
                self._report(pid, descriptor)  # the status first: who sees the time may rely on it
                self.times[pid] = now
                os.close(descriptor)

    def _report(self, pid: int, descriptor: int) -> None:
        try:
            found = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped by whoever started it
            return
        if found is not None:
            self._ended(pid, found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)
