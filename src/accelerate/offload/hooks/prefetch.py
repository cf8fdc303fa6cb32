"""Prefetches the weights of the layers that run next while the current layer computes.

`AccessPredictor` predicts the next layers from the order of earlier forwards; `Prefetcher` reads their weights on one thread
and drops a wrong prediction. A prefetched value is used only if it is still what the layer would read, so prefetching
changes nothing but the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from ...settings import env
from ..disk_weights import OffloadedWeightsLoader
from ..io.mmap_reader import ReadInterruptedError, Stop, never
from .device_transfer import PendingTransfer, TransferStream, stream_to

# Bytes that may wait ahead of the layer that computes: the size of the largest layer, or this if it is more.
_ROOM = 16 << 20
_FARTHEST = 64
# Resident weights take no extra memory; at most this many bytes of them are looked up at once.
_NEAR = 64 << 20
_END = -1


class Prefetchable(Protocol):
    """Weights that are read together: those of one hook.

    Attributes:
        size: Bytes of the weights.
        device: The target device.
    """

    size: int

    @property
    def device(self) -> torch.device | None:
        """The target device."""

    def read(self, stop: Stop) -> dict[str, torch.Tensor]:
        """Reads the weights by name; called in any thread."""

    def is_resident(self) -> bool:
        """Returns whether reading the weights takes negligible time."""

    def loader(self) -> OffloadedWeightsLoader | None:
        """Returns the loader that reads the weights, shared with other units."""

    def sources(self) -> list[object] | None:
        """Returns a list that compares equal as long as `read` would return the same; None: do not prefetch."""


class AccessPredictor:
    """Predicts the next units, by number, from the order in which units were used.

    A second-order Markov predictor: the unit that followed two others is expected to follow them again. Without a history,
    units are expected in the order of their numbers.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int | None, int | None], int] = {}
        self._last: tuple[int | None, int | None] = (None, None)

    def record(self, number: int) -> None:
        """Records that a unit is used now."""
        self._after[self._last] = number
        self._last = (self._last[1], number)

    def finish(self, completed: bool = True) -> None:
        """Records the end of the model's forward; `completed`: it did not raise."""
        if completed and self._last[1] is not None:
            self._after[self._last] = _END
        self._last = (None, None)

    @property
    def last(self) -> int | None:
        """The unit used last; None at the start."""
        return self._last[1]

    def predictions(self) -> Iterator[int]:
        """Yields the units expected next; may be infinite."""
        before, last = self._last
        while last is not None:
            number = self._after.get((before, last), last + 1)
            if number == _END:
                return
            yield number
            before, last = last, number


class _Resident(NamedTuple):
    """A resident unit that was read before its turn.

    Attributes:
        sources: Sources of the weights.
        values: The weights by name.
    """

    sources: list[object]
    values: dict[str, torch.Tensor]


class _ReadJob:
    """One unit being prefetched."""

    def __init__(
        self, unit: Prefetchable, stream: TransferStream, sources: list[object], thread: ThreadPoolExecutor
    ) -> None:
        self.sources = sources
        self._cancelled = threading.Event()
        self.future = thread.submit(_read, unit, stream, stream.mark(), self._cancelled.is_set)

    def cancel(self) -> None:
        """Cancels the read, or interrupts it."""
        self._cancelled.set()
        self.future.cancel()


def _read(unit: Prefetchable, stream: TransferStream, mark: Any, stop: Stop) -> PendingTransfer | None:
    """Reads a unit on the thread. Returns None if it was interrupted or out of memory; it is read when needed then."""
    try:
        with torch.no_grad():
            return stream.copy_async(unit.read(stop), mark, stop)
    except (ReadInterruptedError, torch.OutOfMemoryError):
        return None


class Prefetcher:
    """Prefetches for the hooks of one model, on one thread. A copy of it (with its model) starts without a history."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._order = AccessPredictor()
        self._numbers: WeakKeyDictionary[Prefetchable, int] = WeakKeyDictionary()
        self._units: WeakValueDictionary[int, Prefetchable] = WeakValueDictionary()
        self._streams: dict[torch.device | None, TransferStream] = {}
        self._jobs: dict[int, _ReadJob] = {}
        self._here: dict[int, _Resident] = {}
        self._leisure: threading.Event | None = None  # set to end work that runs while nothing is prefetched
        self._largest = _ROOM
        self._thread: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Callable[[], Prefetcher], tuple[()]]:
        return Prefetcher, ()  # threads and the history are not copied

    def register(self, unit: Prefetchable) -> int:
        """Numbers a unit, in the order of registration."""
        number = self._numbers.get(unit)
        if number is None:
            number = self._numbers[unit] = len(self._numbers)
            self._units[number] = unit
            self._largest = max(self._largest, unit.size)
        return number

    def take(self, unit: Prefetchable) -> dict[str, torch.Tensor] | None:
        """Returns the prefetched weights of a unit, waiting for a read in progress, and starts to prefetch the next units.

        Args:
            unit: The unit that is used now.

        Returns:
            Its weights by name; None if they must be read now.

        Raises:
            Exception: raised by the read.
        """
        with self._lock:
            if self._process != os.getpid():  # after a fork the thread is gone
                self._begin()
            number = self.register(unit)
            self._order.record(number)
            job, here = self._jobs.pop(number, None), self._here.pop(number, None)
            if here is None:
                self._plan()
        if here is not None:
            return here.values if here.sources == unit.sources() else None
        if job is None:
            return None
        if job.future.cancel():  # not started yet: reading now is faster
            return None
        if job.sources != unit.sources():
            job.cancel()
            return None
        brought = job.future.result()
        return None if brought is None else brought.wait()

    def finish(self, completed: bool = True) -> None:
        """Ends a forward of the model: cancels all jobs, so that nothing stays in memory between forwards."""
        with self._lock:
            last = self._order.last
            self._order.finish(completed)
            if completed and last is not None:
                self._remap_when_idle(self._units.get(last))
            for job in self._jobs.values():
                job.cancel()
            self._jobs.clear()
            self._here.clear()

    def _plan(self) -> None:
        """Starts to read the next units, as far as memory allows, and cancels wrong predictions."""
        coming: set[int] = set()
        waiting = near = 0  # bytes
        for number in islice(self._order.predictions(), _FARTHEST):
            unit = self._units.get(number)
            if unit is None or number in coming:
                break
            if number in self._here or (number not in self._jobs and self._is_near(unit)):
                near += unit.size
                if near > _NEAR or not self._read_here(number, unit):
                    break
            else:
                waiting += unit.size
                if waiting > max(unit.size, self._largest):
                    break
                if number not in self._jobs:
                    self._start(number, unit)
            coming.add(number)
        for number in self._jobs.keys() - coming:
            self._jobs.pop(number).cancel()
        for number in self._here.keys() - coming:
            del self._here[number]

    def _stream(self, unit: Prefetchable) -> TransferStream:
        stream = self._streams.get(unit.device)
        if stream is None:
            stream = self._streams[unit.device] = stream_to(unit.device)
        return stream

    def _is_near(self, unit: Prefetchable) -> bool:
        """Returns whether reading takes less time than handing the unit to the thread."""
        return not self._stream(unit).copies and unit.is_resident()

    def _read_here(self, number: int, unit: Prefetchable) -> bool:
        """Reads a resident unit now: several reads in a row cost much less than one between each two layers."""
        if number in self._here:
            return True
        sources = unit.sources()
        if sources is None:
            return False
        try:
            self._here[number] = _Resident(sources, unit.read(never))
        except Exception:  # noqa: BLE001 - raised again where the weights are needed
            return False
        return True

    def _start(self, number: int, unit: Prefetchable) -> None:
        sources = unit.sources()
        if sources is None:
            return
        if self._leisure is not None:
            self._leisure.set()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="accelerate-offload")
        self._jobs[number] = _ReadJob(unit, self._stream(unit), sources, self._thread)

    def _remap_when_idle(self, unit: Prefetchable | None) -> None:
        """Remaps files that were slow to map in this forward, until the next unit is prefetched."""
        loader = None if unit is None else unit.loader()
        if loader is None or not loader.slow or (self._leisure is not None and not self._leisure.is_set()):
            return
        ended = self._leisure = threading.Event()

        def work() -> None:
            loader.remap_huge_pages(ended.is_set)
            ended.set()

        # A daemon, so that the process can exit while it runs.
        threading.Thread(target=work, name="accelerate-renewal", daemon=True).start()


def prefetcher(wanted: bool | None = None) -> Prefetcher | None:
    """Creates a prefetcher if prefetching is enabled.

    Args:
        wanted: Whether to prefetch. None: as set by ``ACCELERATE_OFFLOAD_PREFETCH``, by default yes.
    """
    on = env.flag("ACCELERATE_OFFLOAD_PREFETCH", default=True) if wanted is None else wanted
    return Prefetcher() if on else None
