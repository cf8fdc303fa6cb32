"""Tensors of one file that are read together, forward after forward: in place, or past the page cache.

What the cache holds is mapped, at no cost. What it does not hold is read past it, which is the fastest way to have it once.
Where that happens again, and memory has room for all, it is read through the cache, to be there the third time.
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

_RENEWALS = 5  # tries, since parts may be in use at the time
_SMALL = 64 << 10  # so many bytes of weights are kept once they were read: reading them again would cost more time


class CachedFile:
    """An open file with weights. It stays readable when it is deleted or another takes its name.

    Args:
        path: The file.
        buffers: Where parts go that are read past the cache.
        windows: What parts are mapped by.
    """

    def __init__(self, path: str | os.PathLike[str], buffers: BufferPool, windows: MmapWindowCache) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self._buffers = buffers
        self.size = regular_file_size(os.fstat(descriptor), self.path)
        self.mapping = MmapFile(descriptor, windows)

    @cached_property
    def direct(self) -> DirectFile:
        """The same file, past the cache."""
        return DirectFile(self._descriptor, self._buffers)

    @cached_property
    def _probe(self) -> CacheProbe:
        return CacheProbe(self._descriptor, self.size)

    def reaches(self, end: int) -> bool:
        """Whether the file still has so many bytes."""
        return os.fstat(self._descriptor).st_size >= end

    def holds(self, runs: Sequence[ByteRange]) -> bool:
        """Whether the cache seems to hold some parts. What it lacks of them is read when they are mapped."""
        holds = self._probe.is_cached
        return all(run.start == run.stop or holds((run.start + run.stop) // 2) for run in runs)


class TensorRead:
    """Some tensors of a file, to be read as often as they are needed.

    Args:
        spans: Where they are.
        open_file: Gives the file, opened or kept open.
        room: Whether memory has room for all that is offloaded.
        slow: Called with this, once mapping was found to be slower than it could be; `remap_huge_pages` mends that.
        keep: Keep small ones in memory.
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
        self._known = False  # whether mapping is slow
        self._renewals = 0
        size = open_file().size
        self._mapped = TensorLayout.of(spans, size)
        self._direct = TensorLayout.of(spans, size, mmap.PAGESIZE)
        self._end = max((span.stop for span in spans), default=0)
        self._small = keep and sum(span.stop - span.start for span in spans) <= _SMALL
        self._kept: list[torch.Tensor] | None = None
        self._passed = False

    def is_resident(self) -> bool:
        """Whether reading them now takes no time worth mentioning."""
        return self._kept is not None or self._open().holds(self._direct.runs)

    def remap_huge_pages(self, stop: Stop) -> bool:
        """Makes mapping them faster, at leisure; see `Mapping.remap_huge_pages`. Returns whether to come back to it."""
        self._renewals += 1
        if not self._room():
            return False
        mapping = self._open().mapping
        done = [mapping.remap_huge_pages(run, stop) for run in self._mapped.runs]
        return not all(done) and self._renewals < _RENEWALS

    def read(self, stop: Stop = never) -> list[torch.Tensor]:
        """The tensors, in memory. What is written to them stays with them.

        Args:
            stop: Asked between pieces; true gives up.

        Raises:
            RuntimeError: when the file has become shorter, or cannot be read.
            Interrupted: when `stop` said so.
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
            # What is beside parts that were there a moment ago is there, too.
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
                f"{file.path} has been cut short or cannot be read any more, while a model reads its weights there. Leave "
                "the file as it is while the model is in use."
            ) from None

    def _in_place(self, file: CachedFile, stop: Stop) -> list[torch.Tensor]:
        parts = [file.mapping.part(run, stop) for run in self._mapped.runs]
        if not self._known and all(file.mapping.is_known(run) for run in self._mapped.runs):
            self._known = True
            if any(file.mapping.is_slow(run) for run in self._mapped.runs):
                self._slow(self)
        return self._mapped.tensors(parts)
