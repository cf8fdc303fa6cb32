"""Workers outlast a request to stop: SIGTERM often goes to all processes of a run, and the run still needs its workers.

They end with their process, as they always do. Without this, a run that is asked to stop fails for want of a worker
instead of saving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

# A worker that hangs must not keep its process, which ends it by the same signal, for ever.
PATIENCE_SECONDS = 600.0


class Outlasting:
    """A ``worker_init_fn`` that has the worker ignore SIGTERM while its process lives, then calls another.

    Args:
        init: The loader's own; None where it has none.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        if hasattr(signal, "SIGTERM") and threading.current_thread() is threading.main_thread():
            _outlast(os.getppid())
        if self.init is not None:
            self.init(worker_id)


def _outlast(parent: int) -> None:
    """Handles SIGTERM. By a handler of Python's, which programs that the worker starts do not inherit."""
    waiting = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(0)
        if not waiting.is_set():
            waiting.set()
            timer = threading.Timer(PATIENCE_SECONDS, os._exit, (0,))
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, handle)
