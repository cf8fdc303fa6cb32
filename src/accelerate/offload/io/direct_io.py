"""Parts of a file read past the page cache, into memory that is used again and again.

A model that does not fit into memory does not fit into the cache either: to go through it would cost fresh memory for every
byte, and drive out what else is there. Each part lies in a buffer, which returns with the last tensor on it.
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
# Of each size, so many buffers wait to be used again: one for the layer that computes, one for the next.
_WAITING = 2


class BufferPool:
    """Memory that begins at a page. Any thread may take some, and any may drop the last tensor over it."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[mmap.mmap]] = {}

    def take(self, size: int) -> memoryview:
        """Memory for so many bytes and up to the end of their page; free again when nothing refers to it."""
        room = 1 << (max(size, mmap.PAGESIZE) - 1).bit_length()  # what is never written to takes no memory
        waiting = self._waiting.setdefault(room, deque(maxlen=_WAITING))
        try:
            memory = waiting.pop()
        except IndexError:
            memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has its own
            advise_huge_pages(memory)
        view = memoryview(memory)
        weakref.finalize(view, waiting.append, memory).atexit = False
        return view


class DirectFile:
    """An open file that is read past the cache, where its system can do that.

    Args:
        descriptor: The file.
        buffers: Where its parts go.
    """

    def __init__(self, descriptor: int, buffers: BufferPool) -> None:
        self._buffers = buffers
        same = f"/proc/self/fd/{descriptor}"  # whatever its name stands for now
        self._descriptor = open_direct(same) if os.path.exists(same) else None
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)

    def part(self, run: ByteRange, stop: Stop) -> MappedRange | None:
        """A part that begins with a page; None where that cannot be done.

        Args:
            run: The part.
            stop: Asked between pieces; true gives up.

        Raises:
            TruncatedFileError: when that much is not there any more.
            Interrupted: when `stop` said so.
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
                if error.errno == errno.EINVAL:  # it takes no such pages
                    return None
                raise
            if not count:
                raise TruncatedFileError
            done += count
        return MappedRange(view, 0)
