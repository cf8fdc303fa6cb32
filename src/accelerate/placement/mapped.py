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
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Where the cache holds a file in pages of this size, mapping a gigabyte takes a millisecond; with small ones, 200.
_LARGE_PAGE = 2 << 20
_CHUNK = 8 << 20
_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap yet
# Reading a part anew may take so many times as long as mapping it in small pages did: as many forwards pay for it.
_WORTH = 8
_NOT_WORTH: set[int] = set()  # devices on which that failed once

Stop = Callable[[], bool]


def never() -> bool:
    """A `Stop` that never stops."""
    return False


class Interrupted(Exception):
    """Reading was given up, because nobody waits for it any more."""


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


class MappedFile:
    """A file that is read in place. It stays readable when it is deleted or another takes its name.

    Args:
        path: The file.
        reread: Whether what the cache holds in small pages may be read anew once, to have it in large ones.
    """

    def __init__(self, path: str | os.PathLike[str], reread: bool = True) -> None:
        self.path = Path(path)
        self._reread = reread and hasattr(os, "posix_fadvise")
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._device = os.fstat(self._descriptor).st_dev
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, spans: Iterable[Span], stop: Stop = never) -> list[torch.Tensor]:
        """Tensors over the file, read into memory. What is written to them stays with them.

        Args:
            spans: Where they are.
            stop: Asked between pieces; true gives up.

        Raises:
            RuntimeError: when the file has become shorter, or cannot be read.
            Interrupted: when `stop` said so.
        """
        wanted = list(spans)
        size = os.fstat(self._descriptor).st_size
        if any(span.stop > size for span in wanted):
            raise RuntimeError(self._cut_short())
        runs = {span: run for run in _runs(wanted, size) for span in run.spans}
        regions = {run: self._region(run, stop) for run in set(runs.values())}
        return [_tensor(regions[runs[span]], span, span.start - runs[span].start) for span in wanted]

    def _region(self, run: _Run, stop: Stop) -> torch.Tensor | None:
        """The bytes of a run of tensors, in memory."""
        if run.stop == run.start:
            return None
        region, begin = self._map(run), time.perf_counter()
        minor, major = self._read_in(region, stop)
        mapping = time.perf_counter() - begin
        if major or not self._reread or self._device in _NOT_WORTH or not _small(minor, len(region)):
            return region
        # Someone else read the file, in small pages. Mapping these costs as much in every forward: try with this part
        # whether it comes in large ones when it is read anew, and soon enough, and let the rest of the file follow.
        self._reread = False
        del region
        self._drop(run.start, run.stop - run.start)
        region, begin = self._map(run), time.perf_counter()
        faults = sum(self._read_in(region, stop))
        if not _small(faults, len(region)) and time.perf_counter() - begin < _WORTH * mapping:
            self._drop(0, 0)
        else:
            _NOT_WORTH.add(self._device)
        return region

    def _drop(self, start: int, count: int) -> None:
        """Has the cache forget a part that nobody uses right now."""
        os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)

    def _map(self, run: _Run) -> torch.Tensor:
        memory = mmap.mmap(self._descriptor, run.stop - run.start, access=mmap.ACCESS_COPY, offset=run.start)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:  # a kernel without large pages
                if error.errno != errno.EINVAL:
                    raise
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _read_in(self, region: torch.Tensor, stop: Stop) -> tuple[int, int]:
        """Reads a region into memory, piece by piece. Returns the faults: pages in the cache, and pages on disk."""
        before = _faults()
        for start in range(0, len(region), _CHUNK):
            if stop():
                raise Interrupted
            if not _populate(region[start : start + _CHUNK]):
                raise RuntimeError(self._cut_short())
        after = _faults()
        return after[0] - before[0], after[1] - before[1]

    def _cut_short(self) -> str:
        return (
            f"{self.path} has been cut short or cannot be read any more, while a model reads its weights there. Leave the "
            "file as it is while the model is in use."
        )


@dataclass(frozen=True)
class _Run:
    """Tensors that lie close together, and the part of the file that is mapped for them."""

    start: int
    stop: int
    spans: tuple[Span, ...]


def _runs(spans: list[Span], size: int) -> list[_Run]:
    """Parts of a file that begin and end where large pages do, each with the tensors in it."""
    runs: list[_Run] = []
    for span in sorted(set(spans), key=lambda span: (span.start, span.stop)):
        large = span.stop - span.start >= _LARGE_PAGE // 8
        page = _LARGE_PAGE if large else mmap.ALLOCATIONGRANULARITY
        start, stop = span.start // page * page, min(-(-span.stop // page) * page, size)
        if runs and start <= runs[-1].stop:
            last = runs.pop()
            runs.append(_Run(min(last.start, start), max(last.stop, stop), (*last.spans, span)))
        else:
            runs.append(_Run(start, stop, (span,)))
    return runs


def _small(faults: int, count: int) -> bool:
    """Whether so many faults mean that some bytes are in small pages. Part of a large page may be, at either end."""
    return count >= 2 * _LARGE_PAGE and faults * _LARGE_PAGE > 6 * count


def _tensor(region: torch.Tensor | None, span: Span, offset: int) -> torch.Tensor:
    if region is None or span.stop == span.start:
        return torch.empty(span.shape, dtype=span.dtype)
    values = region[offset : offset + span.stop - span.start]
    if offset % span.dtype.itemsize:  # a file that was not written for being mapped
        values = values.clone()
    return values.view(span.dtype).reshape(span.shape)


# The system ------------------------------------------------------------------------------------------------------------


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
