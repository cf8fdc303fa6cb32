"""Runs one save at a time beside the training, on a thread."""

from __future__ import annotations

import atexit
import threading

from ..logging import get_logger
from .saving import SaveJob

logger = get_logger(__name__)


class AsyncSaver:
    """Runs jobs on a thread, one at a time. What fails is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: SaveJob) -> None:
        """Begins a job; the one before has been waited for."""
        assert not self.busy

        def work() -> None:
            try:
                job.run()
            except BaseException as error:  # noqa: BLE001 - raised by the next call, on the caller's thread
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint writer")  # the process ends when it has
        self._thread.start()
        atexit.unregister(self._complain)
        atexit.register(self._complain)

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            SaveError: when the last one failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _complain(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            logger.error(f"the last checkpoint was not saved: {self._error}", main_process_only=False)
