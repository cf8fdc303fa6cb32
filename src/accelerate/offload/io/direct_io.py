"""Direct I/O: reads byte ranges of a file past the page cache into a pool of reused buffers.

A model larger than memory is larger than the page cache, too. Reading it through the cache would allocate pages for every
byte and evict other files. Each range is read into one buffer, which returns to the pool with the last tensor that views it.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections import deque

from ...runtime.system.page_cache import open_direct
from .mmap_reader import ByteRange, MappedRange, ReadInterruptedError, Stop, TruncatedFileError, advise_huge_pages

_CHUNK = 8 << 20
# Free buffers kept per size: one for the layer that computes, one for the next.
_WAITING = 2


class BufferPool:
    """Page-aligned buffers for reuse. Thread-safe: any thread may take one or drop the last tensor that views it."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[mmap.mmap]] = {}

    def take(self, size: int) -> memoryview:
        """Returns a buffer of at least `size` bytes; it is free again once nothing refers to it."""
        room = 1 << (max(size, mmap.PAGESIZE) - 1).bit_length()  # pages that are never written take no memory
        waiting = self._waiting.setdefault(room, deque(maxlen=_WAITING))
        try:
            memory = waiting.pop()
        except IndexError:
            memory = mmap.mmap(
                -1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )  # private: not shared after a fork
            advise_huge_pages(memory)
        view = memoryview(memory)
        weakref.finalize(view, waiting.append, memory).atexit = False
        return view


class DirectFile:
    """An open file read with ``O_DIRECT`` where its file system supports it.

    Args:
        descriptor: File descriptor.
        buffers: Pool of the buffers to read into.
    """

    def __init__(self, descriptor: int, buffers: BufferPool) -> None:
        self._buffers = buffers
        same = f"/proc/self/fd/{descriptor}"  # reopens the same file even if its path was replaced
        self._descriptor = open_direct(same) if os.path.exists(same) else None
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)

    def part(self, run: ByteRange, stop: Stop) -> MappedRange | None:
        """Reads a range that starts at a page boundary.

        Args:
            run: The byte range.
            stop: Checked between chunks; returns true to interrupt the read.

        Returns:
            The range in memory; None if direct I/O is not supported.

        Raises:
            TruncatedFileError: if the file ends before the range does.
            ReadInterruptedError: if `stop` returned true.
        """
        if self._descriptor is None:
            return None
        size = run.stop - run.start
        if not size:
            return MappedRange(b"", 0)
        view = self._buffers.take(size)
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        done = 0
        while done < size:
            if stop():
                raise ReadInterruptedError
            try:
                count = os.preadv(self._descriptor, [view[done : min(done + _CHUNK, whole)]], run.start + done)
            except OSError as error:
                if error.errno == errno.EINVAL:  # direct I/O is not supported for this buffer
                    return None
                raise
            if not count:
                raise TruncatedFileError
            done += count
        return MappedRange(view, 0)
