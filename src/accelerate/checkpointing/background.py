"""One save at a time beside the training: it has a thread, and the ranks talk about it in a group of their own."""

from __future__ import annotations

import atexit
import threading

import torch
import torch.distributed as dist

from ..logging import get_logger
from ..runtime import world
from ..runtime.transport import Collectives, TorchCollectives
from .errors import SaveError
from .saving import Job

logger = get_logger(__name__)


class BackgroundWriter:
    """Runs jobs on a thread, one at a time. What fails is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: tuple[Collectives, Collectives] | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def collectives(self) -> Collectives:
        """The ranks in a group of their own. All ranks call this together the first time."""
        everyone = world.current().collectives
        if everyone.size == 1:
            return everyone
        if self._group is None or self._group[0] is not everyone:
            group = _new_group()
            self._group = (everyone, TorchCollectives(torch.device("cpu"), group))
            world.at_exit(self._release)
        return self._group[1]

    def _release(self) -> None:
        self._group = None

    def start(self, job: Job) -> None:
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


def _new_group() -> dist.ProcessGroup:
    limit = world.current().timeout or dist.distributed_c10d._get_default_timeout(dist.Backend("gloo"))
    try:
        # Gloo waits for a peer to connect five times as long as for one that is connected.
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=limit / 5)
        dist.distributed_c10d._set_pg_timeout(limit, group)
    except Exception as error:
        raise SaveError(
            f"saving in the background cannot begin: the other processes do not answer ({error}). One of them has probably "
            "ended."
        ) from error
    return group
