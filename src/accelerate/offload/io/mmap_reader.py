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
from typing import Any, NamedTuple

import torch

# Where the cache holds a file in pages of this size, mapping a gigabyte takes a millisecond; with small ones, 200.
_LARGE_PAGE = 2 << 20
_CHUNK = 8 << 20
_WINDOW = 64 << 20
_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap yet
# Reading a part anew costs less processor time than mapping it in small pages twice; but a slow disk has other things to do.
_SLOWEST = 50e6  # bytes a second
_TRIES = 3
_IN_VAIN: dict[int, int] = {}  # device -> how often in a row that took too long, or brought small pages again

Stop = Callable[[], bool]


def never() -> bool:
    """A `Stop` that never stops."""
    return False


class ReadInterruptedError(Exception):
    """Reading was given up, because nobody waits for it any more."""


class TruncatedFileError(Exception):
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


class ByteRange(NamedTuple):
    """A part of a file that is brought into memory as one: from `start` to before `stop`."""

    start: int
    stop: int


class MappedRange(NamedTuple):
    """A part of a file in memory.

    Attributes:
        memory: What it lies in, as a buffer; there as long as a tensor on it.
        offset: Where in that it begins.
    """

    memory: Any
    offset: int


@dataclass(frozen=True)
class TensorLayout:
    """Where tensors of one file lie in the parts that are brought for them.

    Attributes:
        spans: The tensors.
        runs: The parts, in order.
        places: For each tensor the number of its part, and where in it the tensor begins.
    """

    spans: tuple[Span, ...]
    runs: tuple[ByteRange, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, spans: Sequence[Span], size: int, page: int | None = None) -> TensorLayout:
        """The parts that hold some tensors; those that touch are one.

        Args:
            spans: Where the tensors are.
            size: Length of the file in bytes.
            page: Parts begin and end where such pages do. None: where large ones do, around a tensor that fills any.
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
        """The tensors over the memory of the parts."""
        return [
            _tensor(parts[number], span, offset) for span, (number, offset) in zip(self.spans, self.places, strict=True)
        ]


def _tensor(part: MappedRange, span: Span, offset: int) -> torch.Tensor:
    count, rest = divmod(span.stop - span.start, span.dtype.itemsize)
    assert not rest, f"{span} is no tensor"
    if not count:
        return torch.empty(span.shape, dtype=span.dtype)
    place = part.offset + offset
    if place % span.dtype.itemsize:  # a file that was not written for being mapped
        values = torch.frombuffer(part.memory, dtype=torch.uint8, count=span.stop - span.start, offset=place)
        return values.clone().view(span.dtype).view(span.shape)
    return torch.frombuffer(part.memory, dtype=span.dtype, count=count, offset=place).view(span.shape)


class _Window:
    """A stretch of a file that is mapped at once; its pages come into memory part by part, and go with the last tensor."""

    def __init__(self, owner: object, descriptor: int, start: int, stop: int) -> None:
        self._memory = mmap.mmap(descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
        advise_huge_pages(self._memory)
        self._owner, self._start, self._stop = owner, start, stop
        self._given: set[ByteRange] = set()
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() - start

    def part(self, owner: object, run: ByteRange) -> MappedRange | None:
        """A part; None when it is not in here, or may have been written to since it was given out."""
        if not self.covers(owner, run) or run in self._given:
            return None
        self._given.add(run)
        return MappedRange(self._memory, run.start - self._start)

    def covers(self, owner: object, run: ByteRange) -> bool:
        """Whether a part is in here."""
        return owner is self._owner and self._start <= run.start and run.stop <= self._stop

    def read_in(self, run: ByteRange, stop: Stop) -> None:
        """Brings a part into memory, piece by piece."""
        for start in range(run.start, run.stop, _CHUNK):
            if stop():
                raise ReadInterruptedError
            if not _populate(self._address + start, min(_CHUNK, run.stop - start)):
                raise TruncatedFileError


class MmapWindowCache:
    """The window that was mapped last: whatever else is mapped and unmapped, all processors have to agree on it."""

    def __init__(self) -> None:
        self._last: _Window | None = None

    def part(self, owner: object, descriptor: int, run: ByteRange, size: int) -> tuple[MappedRange, _Window]:
        """A part of a file, whose pages need not be in memory yet, and its window.

        Args:
            owner: Stands for the file; the number of its descriptor may be another's tomorrow.
            descriptor: The file.
            run: The part.
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
        """Whether a part of a file is in it."""
        last = self._last
        return last is not None and last.covers(owner, run)

    def close(self) -> None:
        """Lets go of it."""
        self._last = None


class MmapFile:
    """An open file seen as memory.

    Args:
        descriptor: The file; stays open as long as this is used.
        windows: Shared by the files of a model.
    """

    def __init__(self, descriptor: int, windows: MmapWindowCache) -> None:
        self._descriptor = descriptor
        self._windows = windows
        status = os.fstat(descriptor)
        self._device, self._size = status.st_dev, status.st_size
        self._synced = False
        self._small: dict[ByteRange, bool] = {}  # parts whose pages are known, and whether they are small

    def part(self, run: ByteRange, stop: Stop) -> MappedRange:
        """A part, read into memory. What is written to it stays with it.

        Args:
            run: The part.
            stop: Asked between pieces; true gives up.

        Raises:
            TruncatedFileError: when that much is not there any more.
            Interrupted: when `stop` said so.
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
        if after[1] == before[1]:  # all of it was in the cache
            self._small[run] = _small(after[0] - before[0], run.stop - run.start)
        return part

    def is_open(self, run: ByteRange) -> bool:
        """Whether a part lies in what is mapped already."""
        return self._windows.cover(self, run)

    def is_known(self, run: ByteRange) -> bool:
        """Whether it is known by what pages a part comes."""
        return run in self._small

    def is_slow(self, run: ByteRange) -> bool:
        """Whether a part was found in small pages, and `remap_huge_pages` may change that."""
        return self._small.get(run, False) and _IN_VAIN.get(self._device, 0) < _TRIES and hasattr(os, "posix_fadvise")

    def remap_huge_pages(self, run: ByteRange, stop: Stop) -> bool:
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
        count = run.stop - run.start
        try:
            minor, major = self._faults_of(run, stop)
            if major or not _small(minor, count):  # another process has done so, or it is not in the cache any more
                self._small[run] = False
                return True
            if not self._synced:  # what is not on disk yet cannot be dropped
                os.fsync(self._descriptor)
                self._synced = True
            self._windows.close()  # nor what is mapped
            os.posix_fadvise(self._descriptor, run.start, count, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            minor, major = self._faults_of(run, stop)
        except TruncatedFileError:  # whoever needs it will say so
            return True
        if not major:  # it was not dropped
            return False
        self._small[run] = False
        if _small(minor + major, count) or count < _SLOWEST * (time.perf_counter() - begin):
            _IN_VAIN[self._device] = _IN_VAIN.get(self._device, 0) + 1
        else:
            _IN_VAIN[self._device] = 0
        return True

    def _faults_of(self, run: ByteRange, stop: Stop) -> tuple[int, int]:
        """How many faults it takes to map a part: pages in the cache, and pages on disk."""
        before = _faults()
        _Window(self, self._descriptor, run.start, run.stop).read_in(run, stop)
        after = _faults()
        return after[0] - before[0], after[1] - before[1]


def _small(faults: int, count: int) -> bool:
    """Whether so many faults mean that some bytes are in small pages. Part of a large page may be, at either end."""
    return count >= 2 * _LARGE_PAGE and faults * _LARGE_PAGE > 2 * count


# The system ------------------------------------------------------------------------------------------------------------


def advise_huge_pages(memory: mmap.mmap) -> None:
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


def _populate(address: int, count: int) -> bool:
    """Brings the pages of some mapped bytes, the first of which begins one, into memory. Returns whether that worked."""
    madvise = _madvise()
    if madvise is not None:
        if madvise(address, count, _POPULATE_READ) == 0:
            return True
        if ctypes.get_errno() != errno.EINVAL:  # which is what a kernel says that cannot do it
            return False
    bytes_there: Any = (ctypes.c_char * count).from_address(address)
    for place in range(0, count, mmap.PAGESIZE):
        bytes_there[place]
    return True


def _faults() -> tuple[int, int]:
    """How often this thread found a page not mapped so far: in the cache, and not even there."""
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_THREAD)
    except (ImportError, AttributeError):  # not on every system
        return 0, 0
    return usage.ru_minflt, usage.ru_majflt
