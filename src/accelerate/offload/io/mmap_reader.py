"""Maps tensors from files (mmap) instead of copying them.

Each mapping lives as long as the last tensor that views it; its pages are those of the page cache. This module is
independent of models.
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
from typing import Any, NamedTuple

import torch

# Mapping a gigabyte takes about 1 ms if the page cache holds the file in pages of this size, 200 ms with 4 KiB pages.
_LARGE_PAGE = 2 << 20
_CHUNK = 8 << 20
_WINDOW = 64 << 20
_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap yet
# Rereading a range takes less CPU time than mapping it twice in small pages, but would saturate a slow disk.
_SLOWEST = 50e6  # bytes per second
_TRIES = 3
_FAILED_REMAPS: dict[int, int] = {}  # device -> consecutive remaps that were too slow or yielded small pages again

Stop = Callable[[], bool]


def never() -> bool:
    """Never interrupts; the default `Stop`."""
    return False


class ReadInterruptedError(Exception):
    """Reading was canceled."""


class TruncatedFileError(Exception):
    """A file is shorter than it was, or is no longer readable."""


@dataclass(frozen=True)
class Span:
    """The byte range, dtype and shape of a tensor in a file.

    Attributes:
        start: Offset of the first byte.
        stop: Offset behind the last byte.
        dtype: The dtype.
        shape: The shape.
    """

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class ByteRange(NamedTuple):
    """A range of a file that is read as one: from `start` up to, but not including, `stop`."""

    start: int
    stop: int


class MappedRange(NamedTuple):
    """A byte range in memory.

    Attributes:
        memory: The buffer that holds it; alive as long as a tensor views it.
        offset: Where the range starts in the buffer.
    """

    memory: Any
    offset: int


@dataclass(frozen=True)
class TensorLayout:
    """Assigns tensors of one file to the byte ranges that are read for them.

    Attributes:
        spans: The tensors.
        runs: The byte ranges, in order.
        places: For each tensor the index of its range and its offset in it.
    """

    spans: tuple[Span, ...]
    runs: tuple[ByteRange, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, spans: Sequence[Span], size: int, page: int | None = None) -> TensorLayout:
        """Computes aligned ranges for some tensors and merges adjacent ones.

        Args:
            spans: The tensors.
            size: Length of the file in bytes.
            page: Alignment of the ranges. None: the huge page size for large tensors, the allocation granularity for others.
        """
        runs: list[ByteRange] = []
        numbers: dict[Span, int] = {}
        for span in sorted(set(spans), key=lambda span: (span.start, span.stop)):
            large = span.stop - span.start >= _LARGE_PAGE // 8
            step = page or (_LARGE_PAGE if large else mmap.ALLOCATIONGRANULARITY)
            start, stop = span.start // step * step, min(-(-span.stop // step) * step, size)
            if runs and start <= runs[-1].stop:
                last = runs.pop()
                start, stop = min(last.start, start), max(last.stop, stop)
            runs.append(ByteRange(start, stop))
            numbers[span] = len(runs) - 1
        places = tuple((numbers[span], span.start - runs[numbers[span]].start) for span in spans)
        return cls(tuple(spans), tuple(runs), places)

    def tensors(self, parts: Sequence[MappedRange]) -> list[torch.Tensor]:
        """Returns the tensors as views of the ranges."""
        return [
            _tensor(parts[number], span, offset) for span, (number, offset) in zip(self.spans, self.places, strict=True)
        ]


def _tensor(part: MappedRange, span: Span, offset: int) -> torch.Tensor:
    count, rest = divmod(span.stop - span.start, span.dtype.itemsize)
    assert not rest, f"{span} is no tensor"
    if not count:
        return torch.empty(span.shape, dtype=span.dtype)
    place = part.offset + offset
    if place % span.dtype.itemsize:  # unaligned, so torch cannot view it
        values = torch.frombuffer(part.memory, dtype=torch.uint8, count=span.stop - span.start, offset=place)
        return values.clone().view(span.dtype).view(span.shape)
    return torch.frombuffer(part.memory, dtype=span.dtype, count=count, offset=place).view(span.shape)


class _Window:
    """One mmap of a range of a file. Pages are populated range by range and released with the last tensor."""

    def __init__(self, owner: object, descriptor: int, start: int, stop: int) -> None:
        self._memory = mmap.mmap(descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
        advise_huge_pages(self._memory)
        self._owner, self._start, self._stop = owner, start, stop
        self._given: set[ByteRange] = set()
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() - start

    def part(self, owner: object, run: ByteRange) -> MappedRange | None:
        """Returns a range; None if it is outside the window or was returned before and may have been written to."""
        if not self.covers(owner, run) or run in self._given:
            return None
        self._given.add(run)
        return MappedRange(self._memory, run.start - self._start)

    def covers(self, owner: object, run: ByteRange) -> bool:
        """Returns whether a range of this file lies in the window."""
        return owner is self._owner and self._start <= run.start and run.stop <= self._stop

    def read_in(self, run: ByteRange, stop: Stop) -> None:
        """Populates the pages of a range, chunk by chunk."""
        for start in range(run.start, run.stop, _CHUNK):
            if stop():
                raise ReadInterruptedError
            if not _populate(self._address + start, min(_CHUNK, run.stop - start)):
                raise TruncatedFileError


class MmapWindowCache:
    """Caches the last window, since each mmap and munmap costs a TLB shootdown on all processors."""

    def __init__(self) -> None:
        self._last: _Window | None = None

    def part(self, owner: object, descriptor: int, run: ByteRange, size: int) -> tuple[MappedRange, _Window]:
        """Returns a range of a file, whose pages need not be resident, with its window.

        Args:
            owner: Identifies the file; its descriptor may be reused for another one.
            descriptor: File descriptor.
            run: The byte range.
            size: Length of the file.
        """
        last = self._last
        part = None if last is None else last.part(owner, run)
        if last is None or part is None:
            last = self._last = _Window(owner, descriptor, run.start, min(max(run.stop, run.start + _WINDOW), size))
            part = last.part(owner, run)
            assert part is not None
        return part, last

    def cover(self, owner: object, run: ByteRange) -> bool:
        """Returns whether the cached window contains a range of a file."""
        last = self._last
        return last is not None and last.covers(owner, run)

    def close(self) -> None:
        """Drops the cached window."""
        self._last = None


class MmapFile:
    """An open file whose ranges are mapped into memory.

    Args:
        descriptor: File descriptor; must stay open as long as this object is used.
        windows: Window cache, shared by the files of a model.
    """

    def __init__(self, descriptor: int, windows: MmapWindowCache) -> None:
        self._descriptor = descriptor
        self._windows = windows
        status = os.fstat(descriptor)
        self._device, self._size = status.st_dev, status.st_size
        self._synced = False
        self._small: dict[ByteRange, bool] = {}  # measured ranges, and whether the cache holds them in small pages

    def part(self, run: ByteRange, stop: Stop) -> MappedRange:
        """Maps a range and populates its pages. Writes are private to the mapping (copy-on-write).

        Args:
            run: The byte range.
            stop: Checked between chunks; returns true to interrupt.

        Raises:
            TruncatedFileError: if the file ends before the range does.
            ReadInterruptedError: if `stop` returned true.
        """
        if run.stop == run.start:
            return MappedRange(b"", 0)
        part, window = self._windows.part(self, self._descriptor, run, self._size)
        if run in self._small:
            window.read_in(run, stop)
            return part
        before = _faults()
        window.read_in(run, stop)
        after = _faults()
        if after[1] == before[1]:  # no major faults: all of it was in the cache
            self._small[run] = _small(after[0] - before[0], run.stop - run.start)
        return part

    def is_open(self, run: ByteRange) -> bool:
        """Returns whether a range lies in the cached window."""
        return self._windows.cover(self, run)

    def is_known(self, run: ByteRange) -> bool:
        """Returns whether the page size of a range has been measured."""
        return run in self._small

    def is_slow(self, run: ByteRange) -> bool:
        """Returns whether a range is in small pages and `remap_huge_pages` may change that."""
        return (
            self._small.get(run, False)
            and _FAILED_REMAPS.get(self._device, 0) < _TRIES
            and hasattr(os, "posix_fadvise")
        )

    def remap_huge_pages(self, run: ByteRange, stop: Stop) -> bool:
        """Evicts a range from the page cache and rereads it, so that the cache holds it in huge pages.

        A file that another program read first is often cached in small pages, which slows down every forward; rereading
        costs I/O once. Stops trying on a device where rereading is slow or yields small pages again.

        Args:
            run: The byte range; nothing should use it now.
            stop: Checked between chunks; returns true to interrupt.

        Returns:
            True if nothing is left to do; False if the range was in use and could not be evicted.
        """
        if not self.is_slow(run):
            return True
        count = run.stop - run.start
        try:
            minor, major = self._faults_of(run, stop)
            if major or not _small(minor, count):  # in huge pages by now, or no longer cached
                self._small[run] = False
                return True
            if not self._synced:  # dirty pages cannot be evicted
                os.fsync(self._descriptor)
                self._synced = True
            self._windows.close()  # nor can mapped ones
            os.posix_fadvise(self._descriptor, run.start, count, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            minor, major = self._faults_of(run, stop)
        except TruncatedFileError:  # raised again by the next read
            return True
        if not major:  # not evicted
            return False
        self._small[run] = False
        if _small(minor + major, count) or count < _SLOWEST * (time.perf_counter() - begin):
            _FAILED_REMAPS[self._device] = _FAILED_REMAPS.get(self._device, 0) + 1
        else:
            _FAILED_REMAPS[self._device] = 0
        return True

    def _faults_of(self, run: ByteRange, stop: Stop) -> tuple[int, int]:
        """Maps a range and returns the number of minor (cached) and major (read from disk) page faults."""
        before = _faults()
        _Window(self, self._descriptor, run.start, run.stop).read_in(run, stop)
        after = _faults()
        return after[0] - before[0], after[1] - before[1]


def _small(faults: int, count: int) -> bool:
    """Returns whether a number of faults means small pages; the ends of a range may be in small pages in any case."""
    return count >= 2 * _LARGE_PAGE and faults * _LARGE_PAGE > 2 * count


# The system ------------------------------------------------------------------------------------------------------------


def advise_huge_pages(memory: mmap.mmap) -> None:
    """Advises the kernel to back a mapping with huge pages, where supported."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # the kernel has no huge pages
            if error.errno != errno.EINVAL:
                raise


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[..., int] | None:
    """Returns the C function: unlike Python's, it releases the GIL and accepts newer flags."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    function: Any = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]


def _populate(address: int, count: int) -> bool:
    """Populates the pages of a mapping, from a page-aligned address on. Returns whether that succeeded."""
    madvise = _madvise()
    if madvise is not None:
        if madvise(address, count, _POPULATE_READ) == 0:
            return True
        if ctypes.get_errno() != errno.EINVAL:  # EINVAL: the kernel is older than MADV_POPULATE_READ
            return False
    bytes_there: Any = (ctypes.c_char * count).from_address(address)
    for place in range(0, count, mmap.PAGESIZE):
        bytes_there[place]
    return True


def _faults() -> tuple[int, int]:
    """Returns this thread's minor and major page faults so far; zeros where the system does not count them."""
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_THREAD)
    except (ImportError, AttributeError):  # not available on every system
        return 0, 0
    return usage.ru_minflt, usage.ru_majflt
