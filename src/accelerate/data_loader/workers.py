"""Workers outlast a request to stop: SIGTERM often goes to all processes of a run, and the run still needs its workers.

Without this, a run that is asked to stop fails for want of a worker instead of saving. In return the process ends its
workers itself when it ends: Python's way of doing so is the same signal.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakSet

_iterators: WeakSet[Any] = WeakSet()
_workers: list[Any] = []


class Outlasting:
    """A ``worker_init_fn`` that has the worker ignore SIGTERM while its process lives, then calls another.

    Args:
        init: The loader's own; None where it has none.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        if threading.current_thread() is threading.main_thread():
            parent = os.getppid()

            def handle(number: int, frame: FrameType | None) -> None:
                if os.getppid() != parent:
                    os._exit(0)

            # A handler of Python's: programs that the worker starts do not inherit it.
            signal.signal(signal.SIGTERM, handle)
        if self.init is not None:
            self.init(worker_id)


def note(iterator: Any) -> None:
    """Has the workers of an iterator ended with this process.

    Args:
        iterator: torch's or torchdata's iterator over several processes.
    """
    _workers[:] = [*_running(), *iterator._workers]
    _iterators.add(iterator)
    atexit.unregister(_end_all)
    atexit.register(_end_all)  # runs before multiprocessing's, which would wait for the workers


def _running() -> list[Any]:
    """The workers of this process; one that was forked from another knows that one's."""
    return [worker for worker in _workers if worker._parent_pid == os.getpid() and worker.is_alive()]


def _end_all() -> None:
    if not _running():
        return
    for iterator in list(_iterators):
        iterator._shutdown_workers()
    for worker in _running():  # they hang
        worker.kill()
