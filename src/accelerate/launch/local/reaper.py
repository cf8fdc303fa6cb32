"""Kills orphaned ranks if the launcher dies, and records when each rank exits.

`OrphanReaper` is a process forked before torch is imported that holds one end of a pipe. However the launcher ends, the pipe
closes, and the reaper kills the process groups that it watches: the ranks and their children. `ExitWatcher` records exit
times, from which the launcher determines the rank that failed first: others often fail a moment later, because it is gone.
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
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
# gloo, NCCL's watchdog, torch's stores and its monitored barrier, and `runtime.cluster.rendezvous.init_store`.
_TIMED_OUT = re.compile(
    r"Timed out waiting \d+ms for|collective operation timeout|wait timeout after \d+ms|seconds waiting for clients"
    r"|failed to pass monitoredBarrier|to join and gave up"
)


def lost_peer(error: str) -> bool:
    """Returns whether a rank's error states that another rank is gone: such a rank is not the root cause."""
    return any(words in error for words in _LOST_PEER)


def timed_out(error: str) -> bool:
    """Returns whether a rank's error states that a collective timed out: such a rank is not the root cause either."""
    return _TIMED_OUT.search(error) is not None


def process_state(pid: int) -> str:
    """Returns the letter for the state of a process in /proc (R, S, D, T, t, Z, …), or "" if it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return chr(file.read().rpartition(b")")[2].split()[0][0])
    except (OSError, IndexError):  # it has ended, or this is not Linux
        return ""


class OrphanReaper:
    """Watches process groups until `release`; does nothing on a system without fork."""

    def __init__(self) -> None:
        self._pipe = -1
        if not hasattr(os, "fork"):
            return
        reading, self._pipe = map(_avoid_standard_streams, os.pipe())
        self._pid = os.fork()
        if self._pid == 0:
            _reap_on_close(reading)
        os.close(reading)

    def watch(self, groups: Iterable[int]) -> None:
        """Adds process groups to those that are killed when the launcher ends."""
        self._send("+", groups)

    def forget(self, groups: Iterable[int]) -> None:
        """Removes process groups from those that are killed."""
        self._send("-", groups)

    def release(self) -> None:
        """Ends the reaper, which kills the groups that it still watches."""
        if self._pipe >= 0:
            os.close(self._pipe)
            os.waitpid(self._pid, 0)

    def _send(self, sign: str, groups: Iterable[int]) -> None:
        if self._pipe >= 0:
            os.write(self._pipe, "".join(f"{sign}{group}\n" for group in groups).encode())


def _avoid_standard_streams(descriptor: int) -> int:
    """Moves a descriptor above those of the standard streams, which are free if these were closed."""
    if descriptor > 2:
        return descriptor
    import fcntl

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


def _reap_on_close(pipe: int) -> None:
    """Runs the reaper's process; never returns."""
    os.setsid()  # Ctrl-C and signals to the launcher's group are not for the reaper
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # readers of the launcher's streams must see their end without waiting for the reaper
        os.dup2(null, stream)
    os.dup2(pipe, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    groups: set[int] = set()
    with os.fdopen(3) as lines:
        for line in lines:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    kill_groups(groups)
    os._exit(0)


def kill_groups(groups: Iterable[int]) -> None:
    """Kills process groups; skips those that are gone."""
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone; or another user's process has the number by now
            continue


class ExitWatcher(threading.Thread):
    """Records when each of several processes ends, without reaping it.

    Args:
        processes: Process ids.
        ended: Called in this thread with the process id and the exit status (negative: a signal).

    Attributes:
        times: Process id -> nanoseconds since the epoch.
        supported: False if the system has no process descriptors; `times` stays empty.
    """

    def __init__(self, processes: Iterable[int], ended: Callable[[int, int], None]) -> None:
        super().__init__(name="accelerate-exits", daemon=True)
        self.times: dict[int, int] = {}
        self._ended = ended
        self._open: dict[int, int] = {}
        for pid in processes:
            try:
                self._open[os.pidfd_open(pid)] = pid
            except (AttributeError, OSError):  # not Linux, or an old one
                continue
        self.supported = bool(self._open)
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
                self._report(pid, descriptor)  # before the time is set: its readers rely on the status
                self.times[pid] = now
                os.close(descriptor)

    def _report(self, pid: int, descriptor: int) -> None:
        try:
            found = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped by its parent
            return
        if found is not None:
            self._ended(pid, found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)
