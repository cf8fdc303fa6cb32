"""Tensors in place: parts of a file seen as memory, read when they are needed and given back to the system after use.

Each view is a mapping of its own, which ends with the last tensor on it; no copy is made, and the pages stay in the
system's cache. Nothing here knows about models.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Where the cache holds a file in pages of this size, mapping a gigabyte takes a millisecond; with small ones, 200.
_LARGE_PAGE = 2 << 20
_CHUNK = 8 << 20
_WINDOW = 64 << 20
_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap yet
# Reading a part anew costs less processor time than mapping it in small pages twice; but a slow disk has other things to do.
_SLOWEST = 200e6  # bytes a second
_TRIES = 3
_IN_VAIN: dict[int, int] = {}  # device -> how often that took too long, or brought small pages again

Stop = Callable[[], bool]


def never() -> bool:
    """A `Stop` that never stops."""
    return False


class Interrupted(Exception):
    """Reading was given up, because nobody waits for it any more."""


class CutShort(Exception):
    """A file is shorter than it was, or cannot be read."""


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in a file.

    Attributes:
        start: Its first byte.
        stop: Behind its last byte.
        dtype: Its format.
        shape: Its shape.
    """

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A part of a file that is brought into memory as one: from `start` to before `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where tensors of one file lie in the parts that are brought for them.

    Attributes:
        spans: The tensors.
        runs: The parts, in order.
        places: For each tensor the number of its part, and where in it the tensor begins.
    """

    spans: tuple[Span, ...]
    runs: tuple[Run, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, spans: Sequence[Span], size: int, page: int | None = None) -> Layout:
        """The parts that hold some tensors; those that touch are one.

        Args:
            spans: Where the tensors are.
            size: Length of the file in bytes.
            page: Parts begin and end where such pages do. None: where large ones do, around a tensor that fills any.
        """
        runs: list[Run] = []
        numbers: dict[Span, int] = {}
        for span in sorted(set(spans), key=lambda span: (span.start, span.stop)):
            large = span.stop - span.start >= _LARGE_PAGE // 8
            step = page or (_LARGE_PAGE if large else mmap.ALLOCATIONGRANULARITY)
            start, stop = span.start // step * step, min(-(-span.stop // step) * step, size)
            if runs and start <= runs[-1].stop:
                last = runs.pop()
                start, stop = min(last.start, start), max(last.stop, stop)
            runs.append(Run(start, stop))
            numbers[span] = len(runs) - 1
        places = tuple((numbers[span], span.start - runs[numbers[span]].start) for span in spans)
        return cls(tuple(spans), tuple(runs), places)

    def tensors(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors over the bytes of the parts."""
        return [
            _tensor(parts[number], span, offset) for span, (number, offset) in zip(self.spans, self.places, strict=True)
        ]


def _tensor(part: torch.Tensor, span: Span, offset: int) -> torch.Tensor:
    if span.stop == span.start:
        return torch.empty(span.shape, dtype=span.dtype)
    values = part[offset : offset + span.stop - span.start]
    if offset % span.dtype.itemsize:  # a file that was not written for being mapped
        values = values.clone()
    return values.view(span.dtype).view(span.shape)


class _Window:
    """A stretch of a file that is mapped at once; its pages come into memory part by part, and go with the last tensor.

    Attributes:
        region: Its bytes.
    """

    def __init__(self, owner: object, descriptor: int, start: int, stop: int) -> None:
        memory = mmap.mmap(descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
        ask_for_large_pages(memory)
        self._owner, self._start, self._stop = owner, start, stop
        self._given: set[Run] = set()
        self.region = torch.frombuffer(memory, dtype=torch.uint8)

    def part(self, owner: object, run: Run) -> torch.Tensor | None:
        """The bytes of a part; None when it is not in here, or may have been written to since it was given out."""
        if owner is not self._owner or run.start < self._start or run.stop > self._stop or run in self._given:
            return None
        self._given.add(run)
        return self.region[run.start - self._start : run.stop - self._start]


class Windows:
    """The window that was mapped last: whatever else is mapped and unmapped, all processors have to agree on it."""

    def __init__(self) -> None:
        self._last: _Window | None = None

    def part(self, owner: object, descriptor: int, run: Run, size: int) -> torch.Tensor:
        """The bytes of a part of a file; its pages need not be in memory yet.

        Args:
            owner: Stands for the file; the number of its descriptor may be another's tomorrow.
            descriptor: The file.
            run: The part.
            size: Length of the file.
        """
        last = self._last
        part = None if last is None else last.part(owner, run)
        if part is None:
            last = self._last = _Window(owner, descriptor, run.start, min(max(run.stop, run.start + _WINDOW), size))
            part = last.part(owner, run)
        assert part is not None
        return part

    def close(self) -> None:
        """Lets go of it."""
        self._last = None


class Mapping:
    """An open file seen as memory.

    Args:
        descriptor: The file; stays open as long as this is used.
        windows: Shared by the files of a model.
    """

    def __init__(self, descriptor: int, windows: Windows) -> None:
        self._descriptor = descriptor
        self._windows = windows
        status = os.fstat(descriptor)
        self._device, self._size = status.st_dev, status.st_size
        self._synced = False
        self._small: dict[Run, bool] = {}  # parts whose pages are known, and whether they are small

    def part(self, run: Run, stop: Stop) -> torch.Tensor:
        """The bytes of a part, read into memory. What is written to them stays with them.

        Args:
            run: The part.
            stop: Asked between pieces; true gives up.

        Raises:
            CutShort: when that much is not there any more.
            Interrupted: when `stop` said so.
        """
        if run.stop == run.start:
            return torch.empty(0, dtype=torch.uint8)
        region = self._windows.part(self, self._descriptor, run, self._size)
        if run in self._small:
            _read_in(region, stop)
            return region
        before = _faults()
        _read_in(region, stop)
        after = _faults()
        if after[1] == before[1]:  # all of it was in the cache
            self._small[run] = _small(after[0] - before[0], len(region))
        return region

    def is_slow(self, run: Run) -> bool:
        """Whether a part was found in small pages, and `renew` may change that."""
        return self._small.get(run, False) and _IN_VAIN.get(self._device, 0) < _TRIES and hasattr(os, "posix_fadvise")

    def renew(self, run: Run, stop: Stop) -> bool:
        """Has the cache hold a part in large pages that it holds in small ones, since somebody else read it.

        Mapping small pages costs a share of every forward; this costs reading the part once. Given up for a device where
        that takes long, or brings small pages again.

        Args:
            run: A part that nobody uses just now.
            stop: Asked between pieces; true gives up.

        Returns:
            Whether there is nothing left to do; somebody may use the part all the same.
        """
        if not self.is_slow(run):
            return True
        if not self._synced:  # what is not on disk yet cannot be dropped
            os.fsync(self._descriptor)
            self._synced = True
        self._windows.close()  # nor what is mapped
        os.posix_fadvise(self._descriptor, run.start, run.stop - run.start, os.POSIX_FADV_DONTNEED)
        before, begin = _faults(), time.perf_counter()
        try:
            _read_in(region := _Window(self, self._descriptor, run.start, run.stop).region, stop)
        except CutShort:  # whoever needs it will say so
            return True
        took, after = time.perf_counter() - begin, _faults()
        if after[1] == before[1]:  # it was not dropped
            return False
        self._small[run] = False
        if _small(sum(after) - sum(before), len(region)) or len(region) < _SLOWEST * took:
            _IN_VAIN[self._device] = _IN_VAIN.get(self._device, 0) + 1
        return True


def _read_in(region: torch.Tensor, stop: Stop) -> None:
    for start in range(0, len(region), _CHUNK):
        if stop():
            raise Interrupted
        if not _populate(region[start : start + _CHUNK]):
            raise CutShort


def _small(faults: int, count: int) -> bool:
    """Whether so many faults mean that some bytes are in small pages. Part of a large page may be, at either end."""
    return count >= 2 * _LARGE_PAGE and faults * _LARGE_PAGE > 2 * count


# The system ------------------------------------------------------------------------------------------------------------


def ask_for_large_pages(memory: mmap.mmap) -> None:
    """Has the system use large pages for some memory, where it can."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel without them
            if error.errno != errno.EINVAL:
                raise


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[..., int] | None:
    """The system's own: unlike Python's, it lets other threads run, and it takes what Python does not know yet."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has what we ask for
        return None
    function: Any = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]


def _populate(piece: torch.Tensor) -> bool:
    """Brings the pages of some bytes into memory. Returns whether that was possible."""
    madvise = _madvise()
    if madvise is not None:
        extra = piece.data_ptr() % mmap.PAGESIZE
        if madvise(piece.data_ptr() - extra, len(piece) + extra, _POPULATE_READ) == 0:
            return True
        if ctypes.get_errno() != errno.EINVAL:  # which is what a kernel says that cannot do it
            return False
    piece[:: mmap.PAGESIZE].sum()
    return True


def _faults() -> tuple[int, int]:
    """How often this thread found a page not mapped so far: in the cache, and not even there."""
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_THREAD)
    except (ImportError, AttributeError):  # not on every system
        return 0, 0
    return usage.ru_minflt, usage.ru_majflt
