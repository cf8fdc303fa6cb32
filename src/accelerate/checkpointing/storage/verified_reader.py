"""Reads a file once, verifying the checksum of each block before any of its bytes is returned.

Threads read ahead into a few reusable buffers. A file that is not in the page cache is read with O_DIRECT where the system
supports it: its bytes are needed once, and a second copy in the cache costs more than the disk.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.system.page_cache import CacheProbe, open_direct
from .file_writer import BLOCK_SIZE, FileRecord

_THREADS = 4
_READ_AHEAD = 3
_MIN_SPLIT_COPY = 2**18


class CorruptFileError(Exception):
    """A file differs from its record."""


class ChecksummedReader(io.RawIOBase):
    """A file of a checkpoint that `torch.load` can read. Call `verify_rest` before leaving its context.

    Args:
        path: The file.
        record: Its record in the manifest.

    Raises:
        CorruptFileError: here or in a read, if the file differs from its record.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self._record = record
        self._position = 0
        self._pending: dict[int, Future[Any]] = {}
        self._read: set[int] = set()
        self._free: list[Any] = []
        self._descriptor = os.open(path, os.O_RDONLY)
        self._direct: int | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "checkpoint reader")
        size = os.fstat(self._descriptor).st_size
        if size != record.size:
            self.close()
            raise CorruptFileError(f"it has {size} bytes and was saved with {record.size}")
        if CacheProbe(self._descriptor, size).cached_fraction(size) <= 0.5:
            self._direct = open_direct(path)

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            self._threads.shutdown(cancel_futures=True)
            for descriptor in (self._descriptor, self._direct):
                if descriptor is not None:
                    os.close(descriptor)
        super().close()

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position of the next read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._record.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, memory: Any) -> int:
        """Fills memory with verified bytes, up to the end of the file."""
        target = np.frombuffer(memory, dtype=np.uint8)
        done = 0
        while done < len(target) and self._position < self._record.size:
            number, offset = divmod(self._position, BLOCK_SIZE)
            block = self._block(number)[offset : offset + len(target) - done]
            self._copy(target[done : done + len(block)], block)
            done += len(block)
            self._position += len(block)
        return done

    def _copy(self, target: Any, block: Any) -> None:
        """Copies on two threads: the target is mostly new memory, whose page faults take longer than the copy."""
        middle = len(block) // 2 if len(block) > _MIN_SPLIT_COPY else 0
        other = self._threads.submit(np.copyto, target[:middle], block[:middle]) if middle else None
        np.copyto(target[middle:], block[middle:])
        if other is not None:
            other.result()

    def verify_rest(self) -> None:
        """Verifies all blocks that have not been read."""
        for number in range(len(self._record.checksums)):
            if number not in self._read:
                self._block(number)

    def _block(self, number: int) -> Any:
        """Returns a verified block and prefetches the next ones. The last one, which has a zip's directory, stays cached."""
        last = len(self._record.checksums) - 1
        wanted = range(number, min(number + _READ_AHEAD, last + 1))
        if number != last:
            for passed in [other for other in self._pending if other not in wanted and other != last]:
                self._free.append(self._pending.pop(passed).result())
        for other in wanted:
            if other not in self._pending:
                buffer = self._free.pop() if self._free else np.frombuffer(mmap.mmap(-1, BLOCK_SIZE), dtype=np.uint8)
                self._pending[other] = self._threads.submit(self._fetch, other, buffer)
        content = self._pending[number].result()
        self._read.add(number)
        return content

    def _fetch(self, number: int, buffer: Any) -> Any:
        start = number * BLOCK_SIZE
        view = memoryview(buffer)
        size = min(BLOCK_SIZE, self._record.size - start)
        done = 0
        if self._direct is not None:
            try:
                done = os.preadv(self._direct, [view], start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        while done < size and (count := os.preadv(self._descriptor, [view[done:size]], start + done)):
            done += count
        if done < size or f"{zlib.crc32(view[:size]):08x}" != self._record.checksums[number]:
            raise CorruptFileError("its content differs from what was saved (checksum)")
        return buffer[:size]
