"""Reads groups of tensors of one file, repeatedly: mapped from the page cache, or by direct I/O past it.

Tensors in the page cache are mapped, without a copy. Others are read by direct I/O, the fastest way to read them once. If
this happens twice and memory has room for all weights, they are read through the cache, so that the third read maps them.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from ...runtime.system.file_names import regular_file_size
from ...runtime.system.page_cache import CacheProbe
from .direct_io import BufferPool, DirectFile
from .mmap_reader import ByteRange, MmapFile, MmapWindowCache, Span, Stop, TensorLayout, TruncatedFileError, never

_RENEWALS = 5  # attempts, since ranges may be in use at the time
_SMALL = 64 << 10  # groups up to this size stay in memory after the first read, since rereading them costs more


class CachedFile:
    """An open file with weights. It stays readable after its path is deleted or replaced.

    Args:
        path: The file.
        buffers: Buffers for direct I/O.
        windows: Cache of mmap windows.
    """

    def __init__(self, path: str | os.PathLike[str], buffers: BufferPool, windows: MmapWindowCache) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK, opening a FIFO would block until it has a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self._buffers = buffers
        self.size = regular_file_size(os.fstat(descriptor), self.path)
        self.mapping = MmapFile(descriptor, windows)

    @cached_property
    def direct(self) -> DirectFile:
        """The same file, opened for direct I/O."""
        return DirectFile(self._descriptor, self._buffers)

    @cached_property
    def _probe(self) -> CacheProbe:
        return CacheProbe(self._descriptor, self.size)

    def reaches(self, end: int) -> bool:
        """Returns whether the file has at least `end` bytes."""
        return os.fstat(self._descriptor).st_size >= end

    def holds(self, runs: Sequence[ByteRange]) -> bool:
        """Estimates whether the page cache holds some ranges, by the page in the middle of each."""
        holds = self._probe.is_cached
        return all(run.start == run.stop or holds((run.start + run.stop) // 2) for run in runs)


class TensorRead:
    """Some tensors of a file that are read together.

    Args:
        spans: The tensors.
        open_file: Returns the open file.
        room: Returns whether free memory has room for all offloaded weights.
        slow: Called with this object once its pages prove to be small; `remap_huge_pages` fixes that.
        keep: Keep small groups in memory.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        open_file: Callable[[], CachedFile],
        room: Callable[[], bool],
        slow: Callable[[TensorRead], None],
        keep: bool = True,
    ) -> None:
        self._open = open_file
        self._room = room
        self._slow = slow
        self._known = False  # whether the page size has been measured
        self._renewals = 0
        size = open_file().size
        self._mapped = TensorLayout.of(spans, size)
        self._direct = TensorLayout.of(spans, size, mmap.PAGESIZE)
        self._end = max((span.stop for span in spans), default=0)
        self._small = keep and sum(span.stop - span.start for span in spans) <= _SMALL
        self._kept: list[torch.Tensor] | None = None
        self._passed = False

    def is_resident(self) -> bool:
        """Returns whether reading takes negligible time."""
        return self._kept is not None or self._open().holds(self._direct.runs)

    def remap_huge_pages(self, stop: Stop) -> bool:
        """Remaps the tensors in huge pages; see `MmapFile.remap_huge_pages`. Returns whether to try again later."""
        self._renewals += 1
        if not self._room():
            return False
        mapping = self._open().mapping
        done = [mapping.remap_huge_pages(run, stop) for run in self._mapped.runs]
        return not all(done) and self._renewals < _RENEWALS

    def read(self, stop: Stop = never) -> list[torch.Tensor]:
        """Reads the tensors into memory. Writes to them do not reach the file.

        Args:
            stop: Checked between chunks; returns true to interrupt.

        Raises:
            RuntimeError: if the file has become shorter, or is no longer readable.
            ReadInterruptedError: if `stop` returned true.
        """
        if self._small:
            if self._kept is None:
                self._kept = [value.clone() for value in self._read(stop)]
            return [value.clone() for value in self._kept]
        return self._read(stop)

    def _read(self, stop: Stop) -> list[torch.Tensor]:
        file = self._open()
        try:
            if not file.reaches(self._end):
                raise TruncatedFileError
            # If the ranges are still mapped, assume that the rest of their pages is cached, too.
            if all(map(file.mapping.is_open, self._mapped.runs)) or file.holds(self._direct.runs):
                return self._in_place(file, stop)
            if self._passed and self._room():
                self._passed = False
                return self._in_place(file, stop)
            self._passed = True
            parts = [file.direct.part(run, stop) for run in self._direct.runs]
            found = [part for part in parts if part is not None]
            return self._direct.tensors(found) if len(found) == len(parts) else self._in_place(file, stop)
        except TruncatedFileError:
            raise RuntimeError(
                f"{file.path} was truncated or is no longer readable, while a model reads its weights from it. Keep the "
                "file unchanged while the model is in use."
            ) from None

    def _in_place(self, file: CachedFile, stop: Stop) -> list[torch.Tensor]:
        parts = [file.mapping.part(run, stop) for run in self._mapped.runs]
        if not self._known and all(file.mapping.is_known(run) for run in self._mapped.runs):
            self._known = True
            if any(file.mapping.is_slow(run) for run in self._mapped.runs):
                self._slow(self)
        return self._mapped.tensors(parts)
