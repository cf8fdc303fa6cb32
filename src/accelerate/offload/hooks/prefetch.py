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

# As much as the largest layer takes may wait ahead of the one that computes, and this much in any case.
_ROOM = 16 << 20
_FARTHEST = 64
# Weights that are used where they are take no memory; so much of them is looked up in one go.
_NEAR = 64 << 20
_END = -1


class Prefetchable(Protocol):
    """What is read as one: the weights that one hook fetches.

    Attributes:
        size: Bytes of the weights.
        device: Where they go.
    """

    size: int

    @property
    def device(self) -> torch.device | None:
        """Where they go."""

    def read(self, stop: Stop) -> dict[str, torch.Tensor]:
        """The weights by name; called in any thread."""

    def is_resident(self) -> bool:
        """Whether reading the weights takes no time worth mentioning."""

    def loader(self) -> OffloadedWeightsLoader | None:
        """What reads them, together with those of other units."""

    def sources(self) -> list[object] | None:
        """What equals another such list as long as `read` would give the same; None: do not read ahead."""


class AccessPredictor:
    """The order in which units are used, by number: learned while they are, and guessed before.

    What came after two units is what will come after them again. Where that is not known yet, units are used in the order
    of their numbers.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int | None, int | None], int] = {}
        self._last: tuple[int | None, int | None] = (None, None)

    def record(self, number: int) -> None:
        """A unit is used now."""
        self._after[self._last] = number
        self._last = (self._last[1], number)

    def finish(self, completed: bool = True) -> None:
        """The forward of the whole is over; `completed`: to its end."""
        if completed and self._last[1] is not None:
            self._after[self._last] = _END
        self._last = (None, None)

    @property
    def last(self) -> int | None:
        """The unit used last; None at the beginning."""
        return self._last[1]

    def predictions(self) -> Iterator[int]:
        """Which units will be used next, one after the other. May go on forever."""
        before, last = self._last
        while last is not None:
            number = self._after.get((before, last), last + 1)
            if number == _END:
                return
            yield number
            before, last = last, number


class _Resident(NamedTuple):
    """One unit that was at hand, and read before its turn.

    Attributes:
        sources: What its weights came from.
        values: The weights by name.
    """

    sources: list[object]
    values: dict[str, torch.Tensor]


class _ReadJob:
    """One unit being read ahead."""

    def __init__(
        self, unit: Prefetchable, stream: TransferStream, sources: list[object], thread: ThreadPoolExecutor
    ) -> None:
        self.sources = sources
        self._cancelled = threading.Event()
        self.future = thread.submit(_read, unit, stream, stream.mark(), self._cancelled.is_set)

    def cancel(self) -> None:
        """Gives it up."""
        self._cancelled.set()
        self.future.cancel()


def _read(unit: Prefetchable, stream: TransferStream, mark: Any, stop: Stop) -> PendingTransfer | None:
    """What the thread does. None: nothing came of it, and the weights are to be read when they are needed."""
    try:
        with torch.no_grad():
            return stream.copy_async(unit.read(stop), mark, stop)
    except (ReadInterruptedError, torch.OutOfMemoryError):
        return None


class Prefetcher:
    """Reads ahead for the hooks of one model, in one thread. A copy of it (with its model) starts from nothing."""

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
        self._leisure: threading.Event | None = None  # ends what is done while there is nothing to read ahead
        self._largest = _ROOM
        self._thread: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Callable[[], Prefetcher], tuple[()]]:
        return Prefetcher, ()  # threads and learned numbers stay behind

    def register(self, unit: Prefetchable) -> int:
        """Gives a unit its number; the first guess is that units are used in the order they came here."""
        number = self._numbers.get(unit)
        if number is None:
            number = self._numbers[unit] = len(self._numbers)
            self._units[number] = unit
            self._largest = max(self._largest, unit.size)
        return number

    def take(self, unit: Prefetchable) -> dict[str, torch.Tensor] | None:
        """What was read ahead for a unit, waited for if it is being read; and has the next ones read.

        Args:
            unit: The unit that is used now.

        Returns:
            Its weights by name, or None: read them now.

        Raises:
            Exception: what reading raised.
        """
        with self._lock:
            if self._process != os.getpid():  # forked: the thread is not here
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
        if job.future.cancel():  # it has not begun: whoever needs it reads it sooner
            return None
        if job.sources != unit.sources():
            job.cancel()
            return None
        brought = job.future.result()
        return None if brought is None else brought.wait()

    def finish(self, completed: bool = True) -> None:
        """The forward of the whole model is over: nothing stays in memory ahead of the next one."""
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
        """Has those read that come next, as far as there is room, and gives up what was a wrong guess."""
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
        """Whether a thread would take longer than reading."""
        return not self._stream(unit).copies and unit.is_resident()

    def _read_here(self, number: int, unit: Prefetchable) -> bool:
        """Reads a unit at once: several in a row cost much less than each between two layers that compute."""
        if number in self._here:
            return True
        sources = unit.sources()
        if sources is None:
            return False
        try:
            self._here[number] = _Resident(sources, unit.read(never))
        except Exception:  # noqa: BLE001 - it will be raised where the weights are needed
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
        """Has the loader make faster what was slow in this forward, until something is to be read ahead."""
        loader = None if unit is None else unit.loader()
        if loader is None or not loader.slow or (self._leisure is not None and not self._leisure.is_set()):
            return
        ended = self._leisure = threading.Event()

        def work() -> None:
            loader.remap_huge_pages(ended.is_set)
            ended.set()

        # A daemon: it may be at it for long, and nobody waits for it.
        threading.Thread(target=work, name="accelerate-renewal", daemon=True).start()


def prefetcher(wanted: bool | None = None) -> Prefetcher | None:
    """A new one, if reading ahead is wanted.

    Args:
        wanted: The caller's word. None: as ``ACCELERATE_OFFLOAD_PREFETCH`` says, else yes.
    """
    on = env.flag("ACCELERATE_OFFLOAD_PREFETCH", default=True) if wanted is None else wanted
    return Prefetcher() if on else None
