"""A pool of worker processes that run a test's function on real gloo ranks, over loopback.

`RankPool.run(n, fn, ...)` sends `fn` (by its name, so it must be a module-level function) to n workers. They are
started when first needed and reused by later calls; every call gets a process group of its own, joined through the
variables that torchrun would set. A worker that dies or hangs is killed and replaced, and the test fails with what it
last said.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0
"""How long the other ranks may take to notice that one has failed, before they are killed."""


@dataclass
class RankFailure:
    """How one rank of a call ended, when it did not return."""

    rank: int
    exception: BaseException | None
    """The exception itself where it survives pickling, else None."""
    kind: str
    """The exception's class name, or "died", or "timeout"."""
    text: str
    """The traceback, or the last lines the worker wrote."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}\n{self.text}"


class RankError(AssertionError):
    """A rank of a `run_ranks` call failed; the failures are listed in the order in which they were noticed."""

    def __init__(self, title: str, failures: list[RankFailure]) -> None:
        self.failures = failures
        super().__init__(title + "\n\n" + "\n\n".join(str(failure) for failure in failures))


@dataclass
class Job:
    """What a worker is asked to do. The function travels pickled on its own: unpickling it may fail."""

    number: int
    rank: int
    size: int
    environment: dict[str, str]
    path: list[str]
    work: bytes
    join: bool
    group_timeout: float


@dataclass
class Reply:
    """What a worker answers: a pickled value, or how it failed."""

    number: int
    rank: int
    value: bytes | None = None
    exception: bytes | None = None
    kind: str = ""
    text: str = ""


@dataclass
class Worker:
    """One process of the pool, seen from the parent."""

    process: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]

    @classmethod
    def start(cls) -> Worker:
        here, there = Pipe()
        log = tempfile.TemporaryFile(prefix="rank-worker-")  # noqa: SIM115 - lives as long as the worker
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.helpers.rank_worker", str(there.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[there.fileno()],
            env=environment,
            cwd=ROOT,
        )
        there.close()
        return cls(process, here, log)

    def alive(self) -> bool:
        return self.process.poll() is None

    def written(self) -> int:
        return os.fstat(self.log.fileno()).st_size

    def tail(self, since: int, limit: int = 4000) -> str:
        start = max(since, self.written() - limit)
        return os.pread(self.log.fileno(), limit, start).decode(errors="replace")

    def stacks(self, since: int) -> str:
        """Asks a hanging worker where it is (faulthandler answers from inside a C call too), returns what it wrote."""
        if self.alive():
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        return self.tail(since)

    def kill(self) -> None:
        if self.alive():
            self.process.kill()
        self.process.wait()
        self.connection.close()
        self.log.close()


@dataclass
class RankPool:
    """Workers that are reused from call to call, and the store at which the present call's group meets."""

    workers: list[Worker] = field(default_factory=list)
    calls: int = 0
    _store: Any = None

    def run(
        self,
        n: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        group_timeout: float = 20.0,
        join: bool = True,
        raises: bool = False,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Runs `fn(*args, **kwargs)` on ranks 0 to n-1 and returns what each of them returned.

        Args:
            n: the number of ranks.
            fn: a module-level function; it and its arguments are pickled.
            timeout: seconds after which ranks that have not answered are killed and the call fails.
            group_timeout: seconds after which a collective that the other ranks do not join raises.
            join: whether the gloo group is there when `fn` starts. If False, only the variables are (RANK, WORLD_SIZE,
                MASTER_ADDR …), and joining is up to `fn`.
            raises: return a `RankFailure` in the place of each rank that raised, instead of raising `RankError`.
            env: further variables for the workers, for the length of this call.

        Raises:
            RankError: a rank raised, died or took too long; the message holds every failing rank's traceback.
        """
        self._check_picklable_by_name(fn)
        self.calls += 1
        workers = self._take(n)
        marks = [worker.written() for worker in workers]
        work = pickle.dumps((fn, args, kwargs))
        port = self._open_store()
        for rank, worker in enumerate(workers):
            environment = {**self._variables(rank, n, port), **(env or {})}
            job = Job(self.calls, rank, n, environment, list(sys.path), work, join, group_timeout)
            worker.connection.send_bytes(pickle.dumps(job))
        replies: dict[int, Reply] = {}
        failures: dict[int, RankFailure] = {}
        try:
            self._collect(workers, marks, replies, failures, timeout, patient=raises)
        finally:
            unanswered = [worker for rank, worker in enumerate(workers) if rank not in replies]
            failed = bool(failures) and not raises
            self._discard(workers if failed else unanswered)
        results = [
            failures[rank] if rank in failures else pickle.loads(replies[rank].value or b"") for rank in range(n)
        ]
        if failures and not raises:
            title = f"{len(failures)} of {n} ranks failed in {fn.__module__}.{fn.__qualname__}"
            cause = next((failure.exception for failure in failures.values() if failure.exception is not None), None)
            raise RankError(title, list(failures.values())) from cause
        return results

    def close(self) -> None:
        """Ends every worker."""
        self._discard(list(self.workers))
        self._store = None

    def _collect(
        self,
        workers: list[Worker],
        marks: list[int],
        replies: dict[int, Reply],
        failures: dict[int, RankFailure],
        timeout: float,
        patient: bool,
    ) -> None:
        deadline = time.monotonic() + timeout
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                reply = self._receive(connection)
                if reply is None:
                    status = workers[rank].process.wait()
                    text = f"the worker ended with status {status}\n{workers[rank].tail(marks[rank])}"
                    failures[rank] = RankFailure(rank, None, "died", text)
                    continue
                replies[rank] = reply
                if reply.value is None:
                    failures[rank] = RankFailure(rank, _load_exception(reply.exception), reply.kind, reply.text)
            if failures and not patient:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                patient = True
            if not ready and time.monotonic() >= deadline:
                reason = "still running when another rank had failed" if failures else f"no answer after {timeout:g} s"
                for rank in pending.values():
                    text = f"{reason}\n{workers[rank].stacks(marks[rank])}"
                    failures[rank] = RankFailure(rank, None, "timeout", text)
                return

    @staticmethod
    def _receive(connection: Connection) -> Reply | None:
        try:
            reply = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return None
        assert isinstance(reply, Reply)
        return reply

    def _take(self, n: int) -> list[Worker]:
        self._discard([worker for worker in self.workers if not worker.alive()])
        while len(self.workers) < n:
            self.workers.append(Worker.start())
        return self.workers[:n]

    def _discard(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self.workers.remove(worker)

    @staticmethod
    def _variables(rank: int, size: int, port: int) -> dict[str, str]:
        """What torchrun would set for this rank, the store being the parent's."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "ROLE_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_WORLD_SIZE": "1",
            "ROLE_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": "run_ranks",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def _open_store(self) -> int:
        """Opens a fresh store on loopback: in an old one, gloo would find the addresses of the call before."""
        from torch.distributed import TCPStore

        listener = socket.create_server(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
            use_libuv=False,
        )
        return port

    @staticmethod
    def _check_picklable_by_name(fn: Callable[..., Any]) -> None:
        if "<" in getattr(fn, "__qualname__", "<") or fn.__module__ == "__main__":
            raise TypeError(
                f"run_ranks sends functions by their name, and {fn!r} has none that a worker could import: "
                "move it to the top level of the test module"
            )


def _load_exception(data: bytes | None) -> BaseException | None:
    if data is None:
        return None
    try:
        loaded = pickle.loads(data)
    except Exception:  # an exception class whose constructor pickle cannot call: its text travels beside it
        return None
    return loaded if isinstance(loaded, BaseException) else None
