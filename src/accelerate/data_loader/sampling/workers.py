"""Workers outlast a request to stop: SIGTERM often goes to all processes of a run, and the run still needs its workers.

Without this, a run that is asked to stop fails for want of a worker instead of saving. In return the process ends its
workers itself when it ends: Python's way of doing so is the same signal. It is torch's way too, for workers that do not
end by themselves, so a worker whose loader is shutting down obeys.
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
    """A ``worker_init_fn`` that has the worker ignore SIGTERM while its loader is in use, then calls another.

    Args:
        init: The loader's own; None where it has none.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        if threading.current_thread() is threading.main_thread():
            parent, done = os.getppid(), _shutdown_event()

            def handle(number: int, frame: FrameType | None) -> None:
                if os.getppid() != parent:
                    os._exit(0)
                # In a thread: the code that was interrupted may hold the event's lock.
                threading.Thread(target=_exit_if_set, args=(done,), daemon=True).start()

            # A handler of Python's: programs that the worker starts do not inherit it.
            signal.signal(signal.SIGTERM, handle)
        if self.init is not None:
            self.init(worker_id)


def _shutdown_event() -> Any:
    """The event that torch's iterator sets when it shuts down: an argument of the worker's loop, which has no other way to
    it. None where a release of torch calls it something else; the worker then ends with its process only."""
    frame: Any = inspect.currentframe()
    caller = frame.f_back.f_back  # through Outlasting
    return None if caller is None else caller.f_locals.get("done_event")


def _exit_if_set(done: Any) -> None:
    if done is not None and done.is_set():
        os._exit(0)


def track_iterator(iterator: Any) -> None:
    """Ends the workers of an iterator with this process, or with the iterator.

    Args:
        iterator: torch's or torchdata's iterator over several processes.
    """
    # Before the iterator is finalized where it is part of a reference cycle, after that elsewhere.
    finalize(iterator, _on_iterator_collected, list(iterator._workers), iterator._workers_done_event).atexit = False
    _workers[:] = [*_live_workers(), *iterator._workers]
    _iterators.add(iterator)
    atexit.unregister(_shut_down_all)
    atexit.register(_shut_down_all)  # runs before multiprocessing's, which would wait for the workers


def _on_iterator_collected(workers: list[Any], done: Any) -> None:
    """Ends workers that the iterator cannot end. The garbage collector closes the queues of a reference cycle first, so that
    torch's request to stop is not sent: it would wait 5 s for each worker."""
    if any(worker._parent_pid == os.getpid() and worker.is_alive() for worker in workers):
        threading.Thread(target=_terminate_when_set, args=(workers, done), daemon=True).start()


def _terminate_when_set(workers: list[Any], done: Any) -> None:
    if done.wait(timeout=60):  # set once nothing reads any longer what the workers send
        for worker in workers:
            worker.terminate()


def _live_workers() -> list[Any]:
    """The workers of this process; one that was forked from another knows that one's."""
    return [worker for worker in _workers if worker._parent_pid == os.getpid() and worker.is_alive()]


def _shut_down_all() -> None:
    if not _live_workers():
        return
    for iterator in list(_iterators):
        iterator._shutdown_workers()
    for worker in _live_workers():  # they hang
        worker.kill()
