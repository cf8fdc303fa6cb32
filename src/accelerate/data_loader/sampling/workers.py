"""Loader workers ignore SIGTERM, which is often sent to all processes of a run that still needs its workers.

Otherwise a preempted run would fail for lack of a worker instead of saving a checkpoint. In return the process shuts its
workers down at exit, for which Python would use the same signal. torch uses it too, for workers that do not exit by
themselves, so a worker whose loader is shutting down obeys the signal.
"""

from __future__ import annotations

import atexit
import inspect
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakSet, finalize

_iterators: WeakSet[Any] = WeakSet()
_workers: list[Any] = []


class IgnoreSigterm:
    """A ``worker_init_fn`` that makes the worker ignore SIGTERM while its loader is in use.

    Args:
        init: The ``worker_init_fn`` of the loader, called afterwards; None if it has none.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        if threading.current_thread() is threading.main_thread():
            parent, done = os.getppid(), _shutdown_event()

            def handle(number: int, frame: FrameType | None) -> None:
                if os.getppid() != parent:
                    os._exit(0)
                # In a thread: the interrupted code may hold the event's lock.
                threading.Thread(target=_exit_if_set, args=(done,), daemon=True).start()

            # A Python handler, which child processes of the worker do not inherit.
            signal.signal(signal.SIGTERM, handle)
        if self.init is not None:
            self.init(worker_id)


def _shutdown_event() -> Any:
    """Returns the event that torch's iterator sets when it shuts down, which is only a local of torch's worker loop.

    None if the variable has another name in this release of torch; the worker then exits with its parent only.
    """
    frame: Any = inspect.currentframe()
    caller = frame.f_back.f_back  # through IgnoreSigterm
    return None if caller is None else caller.f_locals.get("done_event")


def _exit_if_set(done: Any) -> None:
    if done is not None and done.is_set():
        os._exit(0)


def track_iterator(iterator: Any) -> None:
    """Registers an iterator whose workers are shut down with this process, or when the iterator is collected.

    Args:
        iterator: torch's or torchdata's multiprocessing iterator.
    """
    # Called before the iterator's own finalizer if it is part of a reference cycle, after it otherwise.
    finalize(iterator, _on_iterator_collected, list(iterator._workers), iterator._workers_done_event).atexit = False
    _workers[:] = [*_live_workers(), *iterator._workers]
    _iterators.add(iterator)
    atexit.unregister(_shut_down_all)
    atexit.register(_shut_down_all)  # runs before multiprocessing's, which would wait for the workers


def _on_iterator_collected(workers: list[Any], done: Any) -> None:
    """Terminates workers that the iterator cannot stop.

    The garbage collector closes the queues of a reference cycle first, so that torch's request to stop is not sent, and
    torch would block for 5 s per worker.
    """
    if any(worker._parent_pid == os.getpid() and worker.is_alive() for worker in workers):
        threading.Thread(target=_terminate_when_set, args=(workers, done), daemon=True).start()


def _terminate_when_set(workers: list[Any], done: Any) -> None:
    if done.wait(timeout=60):  # set when the workers' results are no longer read
        for worker in workers:
            worker.terminate()


def _live_workers() -> list[Any]:
    """Returns the live workers of this process; after a fork the list may also hold those of the parent."""
    return [worker for worker in _workers if worker._parent_pid == os.getpid() and worker.is_alive()]


def _shut_down_all() -> None:
    if not _live_workers():
        return
    for iterator in list(_iterators):
        iterator._shutdown_workers()
    for worker in _live_workers():  # they do not respond
        worker.kill()
