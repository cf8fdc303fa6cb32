"""Saves in the background: `AsyncSaver` runs one save at a time on a thread, beside training."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from ..logging import get_logger

logger = get_logger(__name__)


class AsyncSaver:
    """Runs one save at a time on a thread. The next call raises its error."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.pending = False
        """A save was started, and `wait` has not returned since."""

    @property
    def busy(self) -> bool:
        """Returns whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, save: Callable[[], None]) -> None:
        """Calls `save` on a thread. The save before has been waited for."""
        assert not self.busy
        self.pending = True

        def work() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001 - raised by the next call, on the caller's thread
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint writer")  # not a daemon: the process waits for it
        self._thread.start()
        atexit.unregister(self._log_error)
        atexit.register(self._log_error)

    def wait(self) -> None:
        """Returns when no save is in progress.

        Raises:
            SaveError: if the last one failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.pending = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _log_error(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            logger.error(f"the last checkpoint was not saved: {self._error}", main_process_only=False)
